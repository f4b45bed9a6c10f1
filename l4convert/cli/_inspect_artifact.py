"""What ``inspect`` says about an artifact."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.text import require_file, show
from l4convert.cli._adapters import manifest_rows
from l4convert.cli._inspect_checkpoint import layer_rows
from l4convert.cli._render import count, fields, size, table
from l4convert.emit import read_manifest
from l4convert.emit.graph_refs import read_model
from l4convert.emit.staging import MANIFEST_FILE, reported
from l4convert.emit.write import MODEL_FILE
from l4convert.engine.network import PACKED_SCALE, codes_a_word
from l4convert.errors import InputError
from l4convert.runtime import ArtifactInfo, read_artifact
from l4convert.runtime.manifest import is_foreign

# Inputs that hold quantized weights, and those that hold their scales and zero points, by operator (ONNX and ONNX
# Runtime's ContribOperators.md). Packed operators keep two 4-bit weights a byte.
_WEIGHT_INPUTS = {"DequantizeLinear": (0,), "MatMulNBits": (1,), "QMoE": (2, 5, 8)}
_SCALE_INPUTS = {"DequantizeLinear": (1, 2), "MatMulNBits": (2, 3), "QMoE": (3, 6, 9, 11, 12, 13)}
_PACKED = {"MatMulNBits", "QMoE"}


def describe(path: Path, tensors: bool) -> tuple[dict[str, Any], str]:
    """The artifact as JSON fields and as text; ``tensors`` adds a row for each weight to both."""
    manifest = read_manifest(path)
    info = None if is_foreign(manifest) else read_artifact(path)
    said = Fields(manifest, show(path / MANIFEST_FILE))
    model = _load(path / MODEL_FILE)
    weights = [(t.name, onnx.TensorProto.DataType.Name(t.data_type), list(t.dims), _nbytes(t)) for t in _stored(model)]
    operators = Counter(_operator(node) for node in _nodes(model))
    payload: dict[str, Any] = {
        "kind": "artifact",
        "path": str(path),
        **_kind(manifest, info),
        "calibration": _values(said, "calibration"),
        "adapters": manifest.get("adapters", []),
        "tool": _values(said, "tool"),
        "libraries": manifest.get("libraries"),
        "passes": manifest.get("passes"),
        "files": _file_sizes(said),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "operators": dict(operators.most_common()),
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "bytes_by_dtype": _by_dtype(weights),
        "quantized_share": quantized_share(model),
    }
    rows = (
        []
        if info is None
        else [*manifest_rows(manifest), *_kv_rows(info, payload["calibration"]), *layer_rows(info.config)]
    )
    text = [
        _summary(payload, rows),
        _files(payload),
        _operators(payload),
        _io(payload),
        _bytes_table(payload),
    ]
    if tensors:
        payload["tensors"] = [{"name": n, "dtype": d, "shape": s, "bytes": b} for n, d, s, b in weights]
        text.append(table(["tensor", "dtype", "shape", "bytes"], weights, right=[3]))
    return payload, "\n\n".join(text)


def _kind(manifest: dict[str, Any], info: ArtifactInfo | None) -> dict[str, Any]:
    """What the artifact is for; one made of somebody else's model has caches as its exporter made them."""
    if info is None:
        recipe = manifest.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return {"target": manifest.get("target"), "recipe": name, "kv_cache": "as exported", "kv_scheme": None}
    scheme = None if info.kv_scheme is None else info.kv_scheme.to_dict()
    return {"target": info.target, "recipe": info.recipe, "kv_cache": info.kv_cache, "kv_scheme": scheme}


def quantized_share(model: onnx.ModelProto) -> float:
    """The share of the weights (counted one by one, scales left out) that are stored in 4 or 8 bits."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in _stored(model)}
    codes = {tensor.name: codes_a_word(tensor) for tensor in _stored(model)}
    quantized: dict[str, int] = {name: sizes[name] * each for name, each in codes.items() if each}
    scales = {name for name in sizes if name.endswith(PACKED_SCALE)}
    for node in _nodes(model):
        names = dict(enumerate(node.input))
        for index in _WEIGHT_INPUTS.get(node.op_type, ()):
            if (name := names.get(index, "")) in sizes:
                quantized[name] = sizes[name] * (2 if node.op_type in _PACKED else 1)
        scales |= {names.get(index, "") for index in _SCALE_INPUTS.get(node.op_type, ())}
    plain = sum(number for name, number in sizes.items() if name not in quantized and name not in scales)
    whole = plain + sum(quantized.values())
    return sum(quantized.values()) / whole if whole else 0.0


def _values(said: Fields, key: str) -> Mapping[str, Any] | None:
    found = said.object(key)
    return None if found is None else found.values


def _file_sizes(said: Fields) -> dict[str, int]:
    """Bytes of every file, as the manifest has them."""
    files = said.object("files") or Fields({}, said.file)
    return {name: (files.object(name) or files).integer("bytes", low=0, high=1 << 63) for name in files.values}


def _load(path: Path) -> onnx.ModelProto:
    """The graph; the types of its tensors, inputs and outputs are known ones."""
    require_file(path, "convert the checkpoint again")
    with reported(f"{path}: cannot be read"):
        model = read_model(path)
    known = set(onnx.TensorProto.DataType.values())
    types = [(tensor.name, tensor.data_type, known - {onnx.TensorProto.UNDEFINED}) for tensor in _stored(model)]
    types += [(v.name, v.type.tensor_type.elem_type, known) for v in (*model.graph.input, *model.graph.output)]
    for name, number, allowed in types:
        if number not in allowed:
            raise InputError(f"{show(path)}: tensor '{show(name)}': data type {number} is not known")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the bodies of its Ifs, Loops and Scans."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _stored(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for graph in _graphs(model.graph) for tensor in graph.initializer]


def _operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes as stored; ONNX packs 4-bit types two to a byte."""
    four_bits = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}
    if tensor.data_type in four_bits:
        return (int(math.prod(tensor.dims)) + 1) // 2
    return int(math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _by_dtype(weights: Iterable[tuple[str, str, list[int], int]]) -> dict[str, int]:
    result: dict[str, int] = defaultdict(int)
    for _, dtype, _, nbytes in weights:
        result[dtype] += nbytes
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type), "shape": shape}


def _summary(payload: dict[str, Any], layers: list[tuple[str, str]]) -> str:
    tool = payload["tool"] or {}
    return fields(
        [
            ("artifact", payload["path"]),
            ("target", payload["target"]),
            ("recipe", payload["recipe"]),
            ("KV cache", payload["kv_cache"]),
            ("written by", f"{tool.get('name', '?')} {tool.get('version', '?')}"),
            ("opsets", ", ".join(f"{domain} {version}" for domain, version in payload["opsets"].items())),
            ("quantized", f"{payload['quantized_share']:.1%} of the weights"),
            *layers,
        ]
    )


def _kv_rows(info: ArtifactInfo, calibration: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How the caches are quantized, and what their scales were found on."""
    if info.kv_scheme is None:
        return []
    text = calibration or {}
    return [
        ("keys, values", str(info.kv_scheme)),
        ("calibrated", f"on {text.get('tokens', '?')} tokens of {text.get('file', '?')}"),
    ]


def _files(payload: dict[str, Any]) -> str:
    return table(["file", "size"], [(name, size(nbytes)) for name, nbytes in payload["files"].items()], right=[1])


def _operators(payload: dict[str, Any]) -> str:
    return table(["operator", "nodes"], list(payload["operators"].items()), right=[1])


def _io(payload: dict[str, Any]) -> str:
    """Inputs and outputs; the caches of all layers look alike, so only the first pair is shown."""
    rows: list[tuple[object, ...]] = []
    for kind in ("inputs", "outputs"):
        caches = [value for value in payload[kind] if ".key" in value["name"] or ".value" in value["name"]]
        shown = [value for value in payload[kind] if value not in caches[2:]]
        rows += [(kind[:-1], value["name"], value["dtype"], _shape(value["shape"])) for value in shown]
        if len(caches) > 2:
            rows.append((kind[:-1], f"... and {count(len(caches) - 2)} more caches", "", ""))
    return table(["", "name", "dtype", "shape"], rows)


def _shape(dims: list[str | int]) -> str:
    return f"[{', '.join(map(str, dims))}]"


def _bytes_table(payload: dict[str, Any]) -> str:
    rows = [(name, size(nbytes)) for name, nbytes in payload["bytes_by_dtype"].items()]
    return table(["dtype", "bytes"], rows, right=[1])
