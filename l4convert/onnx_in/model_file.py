"""Open an ONNX model that somebody else wrote: checked in full, its weights lazy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.text import require_file, show
from l4convert.emit.onnx_file import parse_onnx
from l4convert.errors import InputError
from l4convert.onnx_in.structure import check_model, graphs_of
from l4convert.onnx_in.tensors import Tensors

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit
_MARK = "l4convert.lazy:"
_HINT = "an ONNX model, as torch.onnx.export saves it, is expected"


@dataclass(frozen=True)
class OnnxInput:
    """A model that was read.

    Attributes:
        path: Its file.
        model: Weights are lazy tensors, small constants are in memory.
        files: The model's file, and those beside it that hold weights.
        nbytes: Of all of them.
    """

    path: Path
    model: ir.Model
    files: tuple[Path, ...]
    nbytes: int


def open_onnx(path: Path) -> OnnxInput:
    """Read a model; no weight outside of its file is read.

    Raises:
        InputError: It cannot be read, is not a well-formed ONNX model, or refers to weights that are not there, not as
            many bytes as their types and shapes say, or outside of its folder.
    """
    proto = _parse(path)
    tensors = Tensors(path)
    check_model(proto, tensors)
    lazy = _take_out(proto, tensors)
    _check_operators(path, proto)
    for graph in graphs_of(proto.graph):
        for tensor in graph.initializer:
            if (found := _marked(tensor.doc_string, lazy)) is not None:
                tensor.dims[:] = found.dims
    proto = _with_types(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # whatever onnx_ir meets: its exceptions have no common base
        raise InputError(f"{show(path)}: not a usable ONNX model: {_first_line(error)}", _HINT) from error
    _put_back(model, lazy)
    files = (path, *tensors.files)
    return OnnxInput(path, model, files, sum(file.stat().st_size for file in files))


def _parse(path: Path) -> onnx.ModelProto:
    size = require_file(path, _HINT)
    if not 0 < size <= MAX_MODEL_BYTES:
        raise InputError(f"{show(path)}: {size:,} bytes; an ONNX model has 1 to {MAX_MODEL_BYTES:,}", _HINT)
    try:
        proto = parse_onnx(path, show(path))
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error.strerror)}") from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise InputError(f"{show(path)}: is not an ONNX model: it has no graph or no IR version", _HINT)
    return proto


def _take_out(proto: onnx.ModelProto, tensors: Tensors) -> list[LazyTensor]:
    """Make weights lazy, and leave an empty tensor with a number in each one's place."""
    lazy: list[LazyTensor] = []
    for graph in graphs_of(proto.graph):
        for tensor in graph.initializer:
            found = tensors.lazy(tensor, f"tensor '{show(tensor.name)}'")
            if found is None:
                tensor.doc_string = ""
                continue
            name, data_type = tensor.name, tensor.data_type
            tensor.Clear()
            tensor.name, tensor.data_type, tensor.doc_string = name, data_type, f"{_MARK}{len(lazy)}"
            tensor.dims.append(0)
            lazy.append(found)
    return lazy


def _check_operators(path: Path, proto: onnx.ModelProto) -> None:
    """Every standard operator is one of its opset, with inputs and attributes that it has (onnx's own checker)."""
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # ValidationError, and what the binding makes of C++ exceptions
        raise InputError(f"{show(path)}: not a valid ONNX model: {_first_line(error)}", _HINT) from error


def _with_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the types of all values that follow from its inputs', where it does not say them itself."""
    said = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    if all(name in said for node in proto.graph.node for name in node.output if name):
        return proto
    try:
        return onnx.shape_inference.infer_shapes(proto)
    except Exception:  # what cannot be inferred is not known; the passes say so where they need it
        return proto


def _put_back(model: ir.Model, lazy: list[LazyTensor]) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            stored = value.const_value
            if stored is None:
                continue
            found = _marked(stored.doc_string or "", lazy)
            if found is not None:
                found.name = value.name
                value.const_value, value.dtype, value.shape = found, found.dtype, ir.Shape(found.dims)
            elif stored.dtype != ir.DataType.STRING:
                value.const_value = ir.Tensor(np.array(stored.numpy()), dtype=stored.dtype, name=value.name)


def _marked(text: str, lazy: list[LazyTensor]) -> LazyTensor | None:
    number = text.removeprefix(_MARK)
    return lazy[int(number)] if text.startswith(_MARK) and number.isdecimal() and int(number) < len(lazy) else None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return show(lines[0] if lines else type(error).__name__)
