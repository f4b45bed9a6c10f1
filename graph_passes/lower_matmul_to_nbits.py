"""Lower MatMul to MatMulNBits: products with dequantized INT4 matrices become ONNX Runtime's 4-bit kernel."""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_initializer, clean_up, quantized_weight, replace_node
from l4convert.quantization import layouts
from l4convert.quantization.recipe import Recipe

CONTRIB = "com.microsoft"


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every ``MatMul`` whose second operand is a stored INT4 matrix, those in bodies of loops included."""
    outcome = Outcome()
    for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == "MatMul" and not n.domain]:
        weight = quantized_weight(node.inputs[1])
        if weight is None or node.graph is None:
            continue
        if weight.values.dtype != ir.DataType.INT4 or len(weight.values.dims) != 2:
            outcome.skip(node.name, f"no 4-bit kernel for {weight.values.dtype} of {len(weight.values.dims)} axes")
            continue
        if not weight.block_size:
            outcome.skip(node.name, "no 4-bit kernel for one scale a column")
            continue
        depth, width = weight.values.dims
        packed = layouts.matmul_nbits(transposed(weight.values), weight.block_size)
        b = Builder(node.name or "matmul")
        output = b.node(
            "MatMulNBits",
            [
                node.inputs[0],
                add_initializer(model.graph, f"{weight.name}_packed", packed),
                add_initializer(model.graph, f"{weight.name}_packed_scale", transposed(weight.scales)),
            ],
            domain=CONTRIB,
            K=depth,
            N=width,
            bits=4,
            block_size=weight.block_size,
        )
        replace_node(node.graph, node, b, output)
        model.graph.opset_imports.setdefault(CONTRIB, 1)
        outcome.fired += 1
    clean_up(model)
    return outcome
