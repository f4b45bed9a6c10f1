"""Find every tensor of an ONNX file that lives outside it, without opening what it refers to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from l4convert.checkpoint.text import require_file, require_inside
from l4convert.emit.onnx_file import parse_onnx
from l4convert.errors import InputError

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit


@dataclass(frozen=True)
class ExternalRef:
    """A reference as the file states it; ``offset`` and ``nbytes`` are -1 where it is missing or not a number."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    location: str
    offset: int
    nbytes: int


def external_refs(path: Path) -> Iterator[ExternalRef]:
    """All external tensors of a model: initializers and attributes, of the graph, its subgraphs and its functions.

    Raises:
        InputError: The file is not an ONNX model.
    """
    model = read_model(path)
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def read_model(path: Path) -> onnx.ModelProto:
    """An artifact's model as its file states it; no tensor outside of the file is opened.

    Raises:
        InputError: The file is not an ONNX model, or a link out of its folder.
    """
    if not 0 < require_file(path) <= MAX_MODEL_BYTES:
        raise InputError(f"{path.name}: is empty, or larger than an ONNX file can be")
    require_inside(path)
    return parse_onnx(path, path.name)


def _of_graph(graph: onnx.GraphProto) -> Iterator[ExternalRef]:
    for tensor in graph.initializer:
        yield from _of_tensor(tensor)
    for sparse in graph.sparse_initializer:
        yield from _of_tensor(sparse.values)
        yield from _of_tensor(sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[ExternalRef]:
    for node in nodes:
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors):
                yield from _of_tensor(tensor)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def _of_tensor(tensor: onnx.TensorProto) -> Iterator[ExternalRef]:
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
        return
    fields = {entry.key: entry.value for entry in tensor.external_data}
    known = tensor.data_type in {int(dtype) for dtype in ir.DataType}
    yield ExternalRef(
        tensor.name,
        ir.DataType(tensor.data_type) if known else ir.DataType.UNDEFINED,
        tuple(tensor.dims),
        fields.get("location", ""),
        _number(fields.get("offset", "0")),
        _number(fields.get("length", "")),
    )


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
