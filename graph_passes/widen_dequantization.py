"""Widen dequantization: ``DequantizeLinear`` to bfloat16 becomes one to float32, and a ``Cast``.

ONNX Runtime registers ``DequantizeLinear`` for float32 and float16 results only (1.31, CPU and CUDA alike). The scales
are bfloat16 numbers kept in float32, so the product is exact and rounded once, as before.

Activations that ``move_activation_scales`` left with scale 1 need no ``DequantizeLinear`` at all: a ``Cast`` does the
same, and leaves the runtime no pair of them to fuse with a ``MatMul`` (``split_activation_scales`` says why not).
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import cast
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_initializer, clean_up, replace_node
from l4convert.graph_passes.matching import constant_of
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every ``DequantizeLinear`` that gives bfloat16, or multiplies with 1; loops' bodies included."""
    outcome = Outcome()
    for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == "DequantizeLinear"]:
        b = Builder(node.name or "dequantized")
        value = _value(b, model.graph, node)
        if value is None or node.graph is None:
            continue
        replace_node(node.graph, node, b, [value])
        outcome.fired += 1
    clean_up(model)
    return outcome


def _value(b: Builder, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """What stands for a node's output; None where it may stay."""
    values, scale = node.inputs[:2]
    constant = constant_of(scale)
    if scale is not None and constant is not None and constant.size == 1 and constant == 1:
        return b.op("Cast", values, to=int(ir.DataType.from_numpy(constant.dtype)))
    if scale is None or not isinstance(tensor := scale.const_value, LazyTensor):
        return None
    if tensor.dtype != ir.DataType.BFLOAT16:
        return None
    wide = add_initializer(graph, f"{scale.name}_wide", cast(tensor, ir.DataType.FLOAT))
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    value = b.op("DequantizeLinear", values, wide, **attributes)
    return b.op("Cast", value, to=int(ir.DataType.BFLOAT16))
