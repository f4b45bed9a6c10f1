"""Lower MoE to expert products: rows are sorted by expert, and each expert multiplies the rows that are its own.

For runtimes with a kernel for a product with one quantized matrix, none for these experts, and shapes that may depend
on data: an expert that no token chose gets no rows, and its weights are not read. All the rest is done once for the
rows of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import Member, Reshaped
from l4convert.checkpoint.lazy import LazyTensor
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
from l4convert.graph_passes.expert_rows import scaled_rows, sort_rows, sum_choices
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe.definition import Inputs, MoESpec, swiglu
from l4convert.quantization.activations import token_scales
from l4convert.quantization.recipe import Recipe


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


def _build(b: Builder, spec: MoESpec, inputs: Inputs, gate_up: list[_Matrix], down: list[_Matrix]) -> ir.Value:
    scaled, chosen = scaled_rows(b, spec, inputs)
    counts, _, _, place = sort_rows(b, spec, chosen)
    row = b.op("Range", b.constant(0), b.op("Squeeze", b.dim(place, 0)), b.constant(1))
    order = b.op("ScatterElements", row, place, row, axis=0)
    hidden = _products(b, spec, b.op("Gather", scaled, order, axis=0), counts, gate_up)
    gate, up = b.node("Split", [hidden], outputs=2, axis=-1, num_outputs=2)
    result = _products(b, spec, swiglu(b, gate, up, spec.compute), counts, down)
    return sum_choices(b, spec, b.op("Gather", result, place, axis=0))


def _products(b: Builder, spec: MoESpec, rows: ir.Value, counts: ir.Value, matrices: Sequence[_Matrix]) -> ir.Value:
    """The rows [R,K], ``counts[e]`` of them for matrix e, times their matrices: [R,N].

    A row that is rounded to FP8 is divided by its scale before the product, and multiplied with it afterwards.
    """
    scales = None
    if spec.activations:
        wide = to_float32(b, rows, spec.compute)
        scales = token_scales(b, wide)
        one = b.constant(1.0, np.float32)
        codes = b.op("QuantizeLinear", b.op("Div", wide, scales), one, output_dtype=int(ir.DataType.FLOAT8E4M3FN))
        rows = b.op("Cast", codes, to=int(COMPUTE_TYPES[spec.compute]))
    parts = b.node("Split", [rows, counts], outputs=len(matrices), axis=0)
    products = [b.op("MatMul", part, matrix.value(b)) for part, matrix in zip(parts, matrices, strict=True)]
    joined = b.op("Concat", *products, axis=0)
    if scales is None:
        return joined
    return from_float32(b, b.op("Mul", to_float32(b, joined, spec.compute), scales), spec.compute)
