"""Widen dequantization: ``DequantizeLinear`` to bfloat16 becomes one to float32, and a ``Cast``.

ONNX Runtime registers ``DequantizeLinear`` for float32 and float16 results only (1.31, CPU and CUDA alike). The scales
are bfloat16 numbers kept in float32, so the product is exact and rounded once, as before.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor, cast
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_initializer, clean_up, replace_node
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every ``DequantizeLinear`` of stored tensors whose scales are bfloat16."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear" and n.domain == ""]:
        scale = node.inputs[1]
        if scale is None or scale.dtype != ir.DataType.BFLOAT16 or not isinstance(scale.const_value, LazyTensor):
            continue
        b = Builder(node.name or "dequantized")
        wide = add_initializer(model.graph, f"{scale.name}_wide", cast(scale.const_value, ir.DataType.FLOAT))
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        value = b.op("DequantizeLinear", node.inputs[0], wide, **attributes)
        replace_node(model.graph, node, b, [b.op("Cast", value, to=int(ir.DataType.BFLOAT16))])
        outcome.fired += 1
    clean_up(model)
    return outcome
