"""Split activation scales: ``DequantizeLinear`` of FP8 activations becomes a conversion and a product with the scale.

ONNX Runtime (1.31) fuses a ``MatMul`` between two ``DequantizeLinear`` into MatMulIntegerToFloat without looking at the
type, and then refuses the model it made, because that kernel takes no FP8. Written as a product, the same numbers load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up, replace_node
from l4convert.graph_passes.matching import constant_of
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every ``DequantizeLinear`` whose operand a ``QuantizeLinear`` computed, functions' bodies included."""
    outcome = Outcome()
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in [n for n in graph if _dequantizes_activations(n)]:
            scale = node.inputs[1]
            if (constant := constant_of(scale)) is not None and constant.size == 1 and constant == 1:
                continue  # split already
            b = Builder(node.name or "activations")
            plain = b.op("DequantizeLinear", node.inputs[0], b.constant(1.0, np.float32))
            product = b.op("Mul", plain, scale)
            replace_node(graph, node, b, [product])
            outcome.fired += 1
    clean_up(model)
    return outcome


def _dequantizes_activations(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    return source is not None and source.op_type == "QuantizeLinear"
