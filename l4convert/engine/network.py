"""The graph that a builder gets: an artifact's model.onnx with its weights left where they are, and what it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from l4convert.emit.graph_refs import read_model
from l4convert.errors import InputError

# The names that the lowering gives to the length of a cache (one name for past and present: they are one buffer).
GLOBAL_LENGTH = "max_sequence"
CHUNKED_LENGTH = "chunked_max_sequence"
FUNCTION_DOMAIN = "l4convert"

_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.FLOAT8E4M3FN: 8,
    onnx.TensorProto.FLOAT8E5M2: 8,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}
# ONNX type -> the precision of hardware profiles that it needs; other types run everywhere.
_PRECISIONS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
    onnx.TensorProto.FLOAT8E5M2: "fp8",
    onnx.TensorProto.FLOAT4E2M1: "fp4",
}
_QUANTIZED = {"int8", "int4", "fp8", "fp4"}
# How lowerings of experts name stacks of codes in words, and the bits of a code (graph_passes/lower_moe_to_loop.py,
# graph_passes/pack_experts.py). Codes are looked up in a table or read by our kernels' integer arithmetic, so by
# themselves they need no precision of the hardware.
_PACKED = {"_int4_packed": 4, "_fp8_packed": 8}
#: How names of their scales end.
PACKED_SCALE = "_packed_scale"


@dataclass(frozen=True)
class Capacity:
    """Slots of the key/value caches of an engine, a token each."""

    global_layers: int
    chunked_layers: int

    def as_dict(self) -> dict[str, int]:
        """What a manifest says of it."""
        return {"global": self.global_layers, "chunked": self.chunked_layers}


@dataclass(frozen=True)
class GraphFacts:
    """What a graph's weights are.

    Attributes:
        precisions: Those of hardware profiles that the graph needs.
        weights_bytes: All initializers.
        packed_bytes: Those of 4-bit values and of words that hold several values, without their scales.
        quantized_weights: How many numbers are stored in 8 or 4 bits.
        unquantized_bytes: Initializers that are neither such numbers nor their scales.
    """

    precisions: frozenset[str]
    weights_bytes: int
    packed_bytes: int
    quantized_weights: int
    unquantized_bytes: int


def load_graph(path: Path) -> onnx.ModelProto:
    """Read model.onnx without the weights that it refers to.

    Raises:
        InputError: It is no ONNX model.
    """
    return read_model(path)


def set_capacity(model: onnx.ModelProto, capacity: Capacity) -> None:
    """Make the lengths of the caches numbers, in place; nothing else changes.

    Raises:
        InputError: A cache has another length than the two that lowering writes.
    """
    lengths = {GLOBAL_LENGTH: capacity.global_layers, CHUNKED_LENGTH: capacity.chunked_layers}
    for graph in graphs_of(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in lengths:
                    dim.dim_value = lengths[dim.dim_param]
    for value in (*model.graph.input, *model.graph.output):
        if is_cache(value.name) and not static_length(value):
            raise InputError(
                f"model.onnx: the length of {value.name} is neither {GLOBAL_LENGTH} nor {CHUNKED_LENGTH}",
                "engines need caches that are updated in place: convert again with --target tensorrt-rtx or tensorrt",
            )


def with_plugin_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the definitions of our own operators, so that TensorRT looks for plugins of these names.

    Its parser takes a function of the model before a plugin of the same name (onnx-tensorrt, ModelImporter.cpp,
    parseNode).
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    bare.functions.extend(function for function in model.functions if function.domain != FUNCTION_DOMAIN)
    return bare


def is_cache(name: str) -> bool:
    """Whether an input or output of the decoder is a key or value cache."""
    return name.startswith(("past_key_values.", "present."))


def static_length(value: onnx.ValueInfoProto) -> bool:
    """Whether the length of a cache [batch, heads, length, width] is a number."""
    dims = value.type.tensor_type.shape.dim
    return len(dims) == 4 and dims[2].HasField("dim_value")


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all graphs inside of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in _GRAPH_ATTRIBUTES else ():
                yield from graphs_of(inner)


_GRAPH_ATTRIBUTES = {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}


def graph_facts(model: onnx.ModelProto) -> GraphFacts:
    """Count what is in a graph's initializers, and find the precisions that it needs."""
    total = packed = weights = unquantized = 0
    types: set[int] = set()
    for graph in graphs_of(model.graph):
        scales = {node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
        for tensor in graph.initializer:
            nbytes = -(-math.prod(tensor.dims) * _BITS.get(tensor.data_type, 8) // 8)
            codes, precision = _codes(tensor), _PRECISIONS.get(tensor.data_type)
            total += nbytes
            packed += nbytes if precision in {"int4", "fp4"} or codes_a_word(tensor) else 0
            weights += codes
            scale = tensor.name in scales or tensor.name.endswith(PACKED_SCALE)
            unquantized += 0 if codes or scale else nbytes
            types.add(tensor.data_type)
        types |= {node_type for node in graph.node for node_type in _types_of(node)}
        types |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    needed = frozenset(_PRECISIONS[t] for t in types if t in _PRECISIONS)
    return GraphFacts(needed, total, packed, weights, unquantized)


def _codes(tensor: onnx.TensorProto) -> int:
    """How many quantized weights a tensor holds."""
    each = codes_a_word(tensor) or int(_PRECISIONS.get(tensor.data_type) in _QUANTIZED)
    return int(math.prod(tensor.dims)) * each


def codes_a_word(tensor: onnx.TensorProto) -> int:
    """How many codes are in an element of packed experts; 0: the tensor is something else."""
    code = next((bits for suffix, bits in _PACKED.items() if tensor.name.endswith(suffix)), 0)
    return _BITS.get(tensor.data_type, 8) // code if code else 0


def _types_of(node: onnx.NodeProto) -> Iterator[int]:
    """Element types that a node names: of a cast, of what it quantizes to, of a constant, of a plugin's products."""
    for attribute in node.attribute:
        if attribute.name in {"to", "output_dtype"}:
            yield attribute.i
        elif node.domain == FUNCTION_DOMAIN and attribute.name == "activations" and attribute.s == b"fp8":
            yield onnx.TensorProto.FLOAT8E4M3FN
        elif attribute.type == onnx.AttributeProto.TENSOR:
            yield attribute.t.data_type


def tensor_bytes(value: onnx.ValueInfoProto, dims: tuple[int, ...]) -> int:
    """Bytes of an input or output of these dimensions."""
    return -(-math.prod(dims) * _BITS.get(value.type.tensor_type.elem_type, 8) // 8)
