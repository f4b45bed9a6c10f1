"""Lower MoE to a loop: each turn takes one expert's weights, still packed, and multiplies a tile of its tokens.

TensorRT-RTX has no kernel for experts, and a ``DequantizeLinear`` in a loop or branch is hoisted out of it: all experts
would be dequantized in every call (docs/adr/0014 has the forms that were tried). So weights are stored as 32-bit words;
a turn gathers the words of its expert, which reads nothing of the others, and looks their codes up in a table. That is
exact, and the same for INT4 and FP8.

Tokens are sorted by expert. With R rows (tokens times top-k) a tile has max(64, ceil(R / E)) of them, so the loop turns
at most once for every expert that was chosen and once for every full tile, however the tokens are spread.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    add_initializer,
    clean_up,
    float_weight,
    quantized_weight,
    replace_node,
    spec_of,
)
from l4convert.graph_passes.expert_rows import scaled_rows, sort_rows, sum_choices
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe.definition import Inputs, MoESpec, swiglu
from l4convert.quantization import layouts
from l4convert.quantization.activations import round_per_token
from l4convert.quantization.recipe import Recipe

#: Fewest rows in a tile. Unpacking an expert takes longer than a product with so few rows.
LEAST_TILE = 64
#: Most elements of a tensor (TensorRT's limit).
MOST_ELEMENTS = (1 << 31) - 1

# Value of every code, in the order of the codes: two's complement nibbles, and E4M3 bytes (whose two NaN codes no
# quantized weight has).
_TABLES = {
    ir.DataType.INT4: np.array([*range(8), *range(-8, 0)], np.float32),
    ir.DataType.FLOAT8E4M3FN: np.nan_to_num(
        np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ),
}


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every call of ``l4convert::MoE`` whose weights can be taken expert by expert."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n)]:
        spec, inputs = spec_of(MoESpec, node), Inputs(*node.inputs)  # type: ignore[arg-type]
        experts = []
        for value in (inputs.gate_up, inputs.down):
            found = _experts(model.graph, value)
            if isinstance(found, str):
                outcome.skip(node.name, found)
                break
            experts.append(found)
        else:
            b = Builder(node.name or "moe")
            replace_node(model.graph, node, b, [_build(b, spec, inputs, *experts)])
            outcome.fired += 1
    clean_up(model)
    return outcome


class _Experts(NamedTuple):
    """A stack [E,K,N] of which one matrix is taken at a time.

    Attributes:
        stored: The matrices, or their codes packed in int32 words [E,K,N/codes].
        dtype: The type they are computed with.
        scales: [E,blocks,N], where they are quantized.
        blocks: Along K.
        codes: In a word.
        table: The value of every code.
        dims: (K, N).
    """

    stored: ir.Value
    dtype: ir.DataType
    scales: ir.Value | None = None
    blocks: int = 1
    codes: int = 1
    table: np.ndarray | None = None
    dims: tuple[int, int] = (0, 0)

    def take(self, b: Builder, expert: ir.Value) -> ir.Value:
        """Matrix [K,N] of ``expert``, an int64 scalar, in the type it is computed with."""
        one = b.op("Gather", self.stored, expert, axis=0)
        if self.scales is None:
            return one if self.stored.dtype == self.dtype else b.op("Cast", one, to=int(self.dtype))
        scales = b.op("Gather", self.scales, expert, axis=0)
        depth, width = self.dims
        codes = b.reshape(unpack_words(b, one, self.codes), [self.blocks, depth // self.blocks, width])
        values = b.op("Gather", b.constant(self.table, self.dtype.numpy()), codes, axis=0)
        return b.reshape(b.op("Mul", values, b.op("Unsqueeze", scales, b.constant([1]))), [depth, width])


def _experts(graph: ir.Graph, weight: ir.Value) -> _Experts | str:
    """The stack behind a weight, stored as the loop wants it; or why it cannot be."""
    if (plain := float_weight(weight)) is not None:
        if plain.tensor.size > MOST_ELEMENTS:
            return f"{plain.name} has more than {MOST_ELEMENTS} elements, which no TensorRT tensor may have"
        stored = add_initializer(graph, f"{plain.name}_stack", plain.tensor)
        return _Experts(stored, plain.dtype)
    quantized = quantized_weight(weight)
    if quantized is None or len(quantized.values.dims) != 3 or quantized.values.dtype not in _TABLES:
        return "the experts' weights are not stored tensors"
    _, depth, width = quantized.values.dims
    codes = 32 // quantized.values.dtype.bitwidth
    if width % codes or depth % quantized.block_size:
        return (
            f"{quantized.name} is {depth} x {width}: its rows do not fill words of {codes} codes, or its columns blocks"
            f" of {quantized.block_size}"
        )
    words = layouts.words(quantized.values)
    if words.size > MOST_ELEMENTS:
        return f"{quantized.name} has more than {MOST_ELEMENTS} words, which no TensorRT tensor may have"
    stored = add_initializer(graph, f"{quantized.name}_packed", words)
    scales = add_initializer(graph, f"{quantized.name}_packed_scale", quantized.scales)
    return _Experts(
        stored,
        quantized.scales.dtype,
        scales,
        blocks=quantized.scales.dims[1],
        codes=codes,
        table=_TABLES[quantized.values.dtype],
        dims=(depth, width),
    )


def unpack_words(b: Builder, words: ir.Value, codes: int) -> ir.Value:
    """The codes in words, the lowest bits first: int32 [K,n] to int32 [K,n,2,codes/2], each at least 0.

    TensorRT has no operators on bits. Half words are taken first, so that all later numbers are at least 0 and its
    truncating division is a shift.
    """
    base, half, zero = 1 << (32 // codes), 1 << 16, b.constant(0, np.int32)

    def number(value: int | list[int]) -> ir.Value:
        return b.constant(value, np.int32)

    quotient = b.op("Div", words, number(half))
    rest = b.op("Sub", words, b.op("Mul", quotient, number(half)))
    negative = b.op("Less", rest, zero)
    low = b.op("Where", negative, b.op("Add", rest, number(half)), rest)
    high = b.op("Where", negative, b.op("Sub", quotient, number(1)), quotient)
    high = b.op("Where", b.op("Less", high, zero), b.op("Add", high, number(half)), high)
    last = b.constant([-1])
    halves = b.op("Concat", *(b.op("Unsqueeze", value, last) for value in (low, high)), axis=-1)
    shifted = b.op("Div", b.op("Unsqueeze", halves, last), number([base**place for place in range(codes // 2)]))
    return b.op("Sub", shifted, b.op("Mul", b.op("Div", shifted, number(base)), number(base)))


class _Routing(NamedTuple):
    """Where rows go; R rows (token t is rows t*k to t*k+k-1), E experts; all int64.

    Attributes:
        rows: R, [].
        order: The rows sorted by expert, [R].
        starts: Where each expert's rows begin in ``order``, and ``ends`` where they end, [E].
        first_tile: Number of each expert's first tile, and ``tiles_end`` that after its last, [E].
        tile: Rows in a tile, [].
    """

    rows: ir.Value
    order: ir.Value
    starts: ir.Value
    ends: ir.Value
    first_tile: ir.Value
    tiles_end: ir.Value
    tile: ir.Value


def _build(b: Builder, spec: MoESpec, inputs: Inputs, gate_up: _Experts, down: _Experts) -> ir.Value:
    scaled, chosen = scaled_rows(b, spec, inputs)
    routing = _route(b, spec, chosen)
    total = _loop(b, spec, routing, scaled, gate_up, down)
    rows = b.slice(total, b.constant([0]), b.op("Unsqueeze", routing.rows, b.constant([0])), axis=0)
    return sum_choices(b, spec, rows)


def _route(b: Builder, spec: MoESpec, chosen: ir.Value) -> _Routing:
    """Sort rows by expert and cut each expert's into tiles; ``chosen``: the expert of each row, int64 [R]."""
    counts, starts, ends, place = sort_rows(b, spec, chosen)
    one = b.constant(1)
    rows = b.op("Squeeze", b.dim(chosen, 0))
    row = b.op("Range", b.constant(0), rows, one)
    order = b.op("ScatterElements", b.op("Mul", row, b.constant(0)), place, row, axis=0)
    share = b.op("Div", b.op("Add", rows, b.constant(spec.num_experts - 1)), b.constant(spec.num_experts))
    tile = b.op("Min", rows, b.op("Max", share, b.constant(LEAST_TILE)))
    tiles = b.op("Div", b.op("Add", counts, b.op("Sub", tile, one)), tile)
    tiles_end = b.op("CumSum", tiles, b.constant(0))
    return _Routing(rows, order, starts, ends, b.op("Sub", tiles_end, tiles), tiles_end, tile)


def _loop(
    b: Builder, spec: MoESpec, routing: _Routing, scaled: ir.Value, gate_up: _Experts, down: _Experts
) -> ir.Value:
    """Every row's output, [R+1,H]; the last row is where tiles that are not full put their surplus."""
    height = b.op("Add", b.op("Unsqueeze", routing.rows, b.constant([0])), b.constant([1]))
    zero = b.constant(0.0, COMPUTE_TYPES[spec.compute].numpy())
    empty = b.op("Expand", zero, b.op("Concat", height, b.constant([spec.hidden_size]), axis=0))
    places = b.op("Range", b.constant(0), routing.tile, b.constant(1))
    turns = b.op("ReduceMax", routing.tiles_end, keepdims=0)
    with b.scope("tile"):
        body = Builder(b.prefix)
    number = _scalar(f"{body.prefix}/number", ir.DataType.INT64)
    go_on = _scalar(f"{body.prefix}/go_on", ir.DataType.BOOL)
    kind = ir.TensorType(COMPUTE_TYPES[spec.compute])
    so_far = ir.Value(name=f"{body.prefix}/so_far", type=kind, shape=ir.Shape([None, spec.hidden_size]))
    before = body.op("Cast", body.op("LessOrEqual", routing.tiles_end, number), to=int(ir.DataType.INT64))
    expert = body.op("ReduceSum", before, keepdims=0)
    first, start, end = (
        body.op("Gather", table, expert, axis=0) for table in (routing.first_tile, routing.starts, routing.ends)
    )
    skipped = body.op("Mul", body.op("Sub", number, first), routing.tile)
    place = body.op("Add", body.op("Add", start, skipped), places)
    last = body.op("Sub", routing.rows, body.constant(1))
    row = body.op("Gather", routing.order, body.op("Min", place, last), axis=0)
    hidden = _product(body, spec, body.op("Gather", scaled, row, axis=0), spec.hidden_size, gate_up.take(body, expert))
    gate, up = body.node("Split", [hidden], outputs=2, axis=-1, num_outputs=2)
    active = swiglu(body, gate, up, spec.compute)
    result = _product(body, spec, active, spec.intermediate_size, down.take(body, expert))
    target = body.op("Where", body.op("Less", place, end), row, routing.rows)
    written = body.op("ScatterND", so_far, body.op("Unsqueeze", target, body.constant([1])), result)
    written.type, written.shape = kind, so_far.shape
    again = body.op("Identity", go_on)
    again.type, again.shape = go_on.type, go_on.shape
    graph = ir.Graph([number, go_on, so_far], [again, written], nodes=body.nodes, name=body.prefix)
    return b.node("Loop", [turns, b.constant(True, np.bool_), empty], body=graph)[0]


def _product(b: Builder, spec: MoESpec, rows: ir.Value, width: int, matrix: ir.Value) -> ir.Value:
    if spec.activations:
        rows = round_per_token(b, rows, width, spec.compute)
    return b.op("MatMul", rows, matrix)


def _scalar(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([]))
