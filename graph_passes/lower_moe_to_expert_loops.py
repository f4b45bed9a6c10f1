"""Lower MoE to expert loops: for each expert, a ``Loop`` over tiles of the tokens that chose it.

For runtimes with a kernel for a product with one quantized matrix, and none for these experts. A loop reads the weights
of an expert once a tile, and never those of one that no token chose: it does not turn. What stands in it are plain
products, which later passes give their kernels.

Tokens are sorted by expert. With R rows (tokens times top-k) a tile has max(16, ceil(R / E)) of them, so that all loops
together run at most twice for every expert that there is, and compute at most twice R rows and 16 a loop, however the
tokens are spread.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor, Member, Reshaped
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, from_float32, to_float32
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    add_initializer,
    clean_up,
    float_weight,
    quantized_weight,
    replace_node,
    spec_of,
)
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe.definition import Inputs, MoESpec, swiglu
from l4convert.quantization.activations import round_per_token
from l4convert.quantization.recipe import Recipe

#: Fewest rows in a tile: as many as one tensor-core instruction takes.
LEAST_TILE = 16


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every call of ``l4convert::MoE`` whose weights are stored."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n)]:
        spec, inputs = spec_of(MoESpec, node), Inputs(*node.inputs)  # type: ignore[arg-type]
        weights = [_matrices(model.graph, value, spec.num_experts) for value in (inputs.gate_up, inputs.down)]
        if None in weights:
            outcome.skip(node.name, "the experts' weights are not stored tensors")
            continue
        b = Builder(node.name or "moe")
        output = _build(b, spec, inputs, *weights)  # type: ignore[arg-type]  # none is None
        replace_node(model.graph, node, b, [output])
        outcome.fired += 1
    clean_up(model)
    return outcome


class _Matrix(NamedTuple):
    """One expert's stored matrix [K,N]: its value, and its scales where it is quantized."""

    stored: ir.Value
    scale: ir.Value | None
    attributes: dict[str, Any]
    dtype: ir.DataType

    def value(self, b: Builder) -> ir.Value:
        """The matrix in the type it is computed with."""
        if self.scale is not None:
            return b.op("DequantizeLinear", self.stored, self.scale, **self.attributes)
        return self.stored if self.stored.dtype == self.dtype else b.op("Cast", self.stored, to=int(self.dtype))


def _matrices(graph: ir.Graph, weight: ir.Value, experts: int) -> list[_Matrix] | None:
    """The experts of a stack [E,K,N], each a stored matrix of its own."""
    if (plain := float_weight(weight)) is not None:
        parts = [Member(plain.tensor, expert) for expert in range(experts)]
        stored = [add_initializer(graph, f"{plain.name}_{e}", part) for e, part in enumerate(parts)]
        return [_Matrix(value, None, {}, plain.dtype) for value in stored]
    quantized = quantized_weight(weight)
    if quantized is None or len(quantized.values.dims) != 3:
        return None
    matrices = []
    for expert in range(experts):
        scales: LazyTensor = Member(quantized.scales, expert)
        attributes = {"axis": 0, "block_size": quantized.block_size}
        if scales.dims[0] == 1:  # one scale a column
            scales, attributes = Reshaped(scales, [scales.dims[1]]), {"axis": 1}
        matrices.append(
            _Matrix(
                add_initializer(graph, f"{quantized.name}_{expert}", Member(quantized.values, expert)),
                add_initializer(graph, f"{quantized.name}_scale_{expert}", scales),
                attributes,
                quantized.scales.dtype,
            )
        )
    return matrices


class _Routing(NamedTuple):
    """Where rows go. R rows (token t is rows t*k to t*k+k-1), E experts.

    Attributes:
        rows: R, int64 [].
        order: The rows sorted by expert, int64 [R].
        counts, starts: Rows of each expert, and where they begin in ``order``, int64 [E].
        tile: Rows in a tile, int64 [].
    """

    rows: ir.Value
    order: ir.Value
    counts: ir.Value
    starts: ir.Value
    tile: ir.Value


def _build(b: Builder, spec: MoESpec, inputs: Inputs, gate_up: list[_Matrix], down: list[_Matrix]) -> ir.Value:
    top, chosen = b.node("TopK", [inputs.router_logits, b.constant([spec.top_k])], outputs=2, axis=-1)
    x = b.op("Unsqueeze", to_float32(b, inputs.x, spec.compute), b.constant([1]))
    scaled = b.op("Mul", x, b.op("Unsqueeze", b.op("Sigmoid", top), b.constant([2])))
    scaled = b.reshape(from_float32(b, scaled, spec.compute), [-1, spec.hidden_size])
    routing = _route(b, spec, b.reshape(chosen, [-1]))
    # One row more than there are: where tiles that are not full put their surplus.
    shape = b.op(
        "Concat", b.op("Add", b.op("Unsqueeze", routing.rows, b.constant([0])), b.constant([1])),
        b.constant([spec.hidden_size]), axis=0,
    )  # fmt: skip
    zero = b.constant(0.0, COMPUTE_TYPES[spec.compute].numpy())
    total = b.op("Expand", zero, shape)
    places = b.op("Range", b.constant(0), routing.tile, b.constant(1))
    for expert in range(spec.num_experts):
        with b.scope(f"expert{expert}"):
            total = _loop(b, spec, routing, places, scaled, total, expert, gate_up[expert], down[expert])
    rows = b.slice(total, b.constant([0]), b.op("Unsqueeze", routing.rows, b.constant([0])), axis=0)
    if spec.top_k == 1:
        return rows
    grouped = b.reshape(to_float32(b, rows, spec.compute), [-1, spec.top_k, spec.hidden_size])
    return from_float32(b, b.op("ReduceSum", grouped, b.constant([1]), keepdims=0), spec.compute)


def _route(b: Builder, spec: MoESpec, chosen: ir.Value) -> _Routing:
    """Sort rows by expert with running counts.

    Args:
        b: Where the nodes go.
        spec: The op's attributes.
        chosen: The expert of each row, int64 [R].
    """
    experts = b.constant(np.arange(spec.num_experts))
    hit = b.op("Equal", b.op("Unsqueeze", chosen, b.constant([1])), experts)
    one_hot = b.op("Cast", hit, to=int(ir.DataType.INT64))
    counts = b.op("ReduceSum", one_hot, b.constant([0]), keepdims=0)
    starts = b.op("Sub", b.op("CumSum", counts, b.constant(0)), counts)
    nth = b.op("Sub", b.op("CumSum", one_hot, b.constant(0)), b.constant(1))
    place = b.op("ReduceSum", b.op("Mul", one_hot, b.op("Add", nth, starts)), b.constant([1]), keepdims=0)
    rows = b.op("Squeeze", b.dim(chosen, 0))
    row = b.op("Range", b.constant(0), rows, b.constant(1))
    order = b.op("ScatterElements", b.op("Mul", row, b.constant(0)), place, row, axis=0)
    share = b.op("Div", b.op("Add", rows, b.constant(spec.num_experts - 1)), b.constant(spec.num_experts))
    tile = b.op("Min", rows, b.op("Max", share, b.constant(LEAST_TILE)))
    return _Routing(rows, order, counts, starts, tile)


def _loop(
    b: Builder,
    spec: MoESpec,
    routing: _Routing,
    places: ir.Value,
    scaled: ir.Value,
    total: ir.Value,
    expert: int,
    gate_up: _Matrix,
    down: _Matrix,
) -> ir.Value:
    """Add one expert's outputs to ``total`` [R+1,H]; ``places`` counts from 0 through a tile."""
    count, start = (b.op("Gather", x, b.constant(expert), axis=0) for x in (routing.counts, routing.starts))
    trips = b.op("Div", b.op("Add", count, b.op("Sub", routing.tile, b.constant(1))), routing.tile)
    body = Builder(b.prefix + "/tile")
    number = ir.Value(name=f"{body.prefix}/number", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    go_on = ir.Value(name=f"{body.prefix}/go_on", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    dtype = ir.TensorType(COMPUTE_TYPES[spec.compute])
    so_far = ir.Value(name=f"{body.prefix}/so_far", type=dtype, shape=ir.Shape([None, spec.hidden_size]))
    place = body.op("Add", body.op("Mul", number, routing.tile), places)
    full = body.op("Less", place, count)
    last = body.op("Sub", routing.rows, body.constant(1))
    row = body.op("Gather", routing.order, body.op("Min", body.op("Add", place, start), last), axis=0)
    hidden = _product(body, spec, body.op("Gather", scaled, row, axis=0), spec.hidden_size, gate_up)
    gate, up = body.node("Split", [hidden], outputs=2, axis=-1, num_outputs=2)
    result = _product(body, spec, swiglu(body, gate, up, spec.compute), spec.intermediate_size, down)
    target = body.op("Unsqueeze", body.op("Where", full, row, routing.rows), body.constant([1]))
    written = body.op("ScatterND", so_far, target, result)
    written.type, written.shape = dtype, so_far.shape
    again = body.op("Identity", go_on)
    again.type, again.shape = go_on.type, go_on.shape
    graph = ir.Graph([number, go_on, so_far], [again, written], nodes=body.nodes, name=body.prefix)
    return b.node("Loop", [trips, b.constant(True, np.bool_), total], body=graph)[0]


def _product(b: Builder, spec: MoESpec, rows: ir.Value, width: int, matrix: _Matrix) -> ir.Value:
    if spec.activations:
        rows = round_per_token(b, rows, width, spec.compute)
    return b.op("MatMul", rows, matrix.value(b))
