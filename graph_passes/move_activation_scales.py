"""Move activation scales: what rounds FP8 activations has scale 1, and the tokens' scales come after the product.

TensorRT fuses an FP8 product only where scales are constants, and its builder fails on the blocked QuantizeLinear of
the canonical form. A token's scale is a factor of its row, so it may as well multiply the product's row:
``(q(x/s)*s) @ W == (q(x/s) @ W) * s``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType, compute_type, from_float32, to_float32
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up, replace_node
from l4convert.quantization.recipe import Recipe


class Rounded(NamedTuple):
    """Activations [..., K] before they are rounded, and their scales [..., 1]; both float32."""

    value: ir.Value
    scale: ir.Value


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every ``MatMul`` whose first operand is rounded token by token, those in bodies of loops included."""
    outcome = Outcome()
    compute = compute_type(model.graph)
    for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == "MatMul"]:
        rounded = _rounded(node.inputs[0])
        if rounded is None or node.graph is None:
            continue
        b = Builder(node.name or "matmul")
        replace_node(node.graph, node, b, [_product(b, rounded, node.inputs[1], compute)])  # type: ignore[arg-type]
        outcome.fired += 1
    clean_up(model)
    return outcome


def _rounded(value: ir.Value | None) -> Rounded | None:
    node = _producer(value)
    if node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    source = _producer(node.inputs[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    if source is None or source.op_type != "QuantizeLinear" or "block_size" not in source.attributes:
        return None
    return Rounded(*source.inputs[:2])  # type: ignore[arg-type]  # neither is optional


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _product(b: Builder, rounded: Rounded, weight: ir.Value, compute: ComputeType) -> ir.Value:
    unit = b.op("Div", rounded.value, rounded.scale)
    one = b.constant(1.0, np.float32)
    quantized = b.op("QuantizeLinear", unit, one, output_dtype=int(ir.DataType.FLOAT8E4M3FN))
    plain = b.op("DequantizeLinear", quantized, b.constant(1.0, COMPUTE_TYPES[compute].numpy()))
    product = to_float32(b, b.op("MatMul", plain, weight), compute)
    return from_float32(b, b.op("Mul", product, rounded.scale), compute)
