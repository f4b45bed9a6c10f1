"""Lower MatMul to MatMulBlockQuantizedFp8Weight: products with FP8 matrices become ONNX Runtime's 8-bit float kernel.

The kernel (com.microsoft, CUDA only) reads 8-bit weights; a ``DequantizeLinear`` in front of a ``MatMul`` would write
and read the whole matrix in wider types at every call. Its scales stand for blocks along K, so one scale a column is
one block as long as K. It has no float32 form: where a graph computes in float32 the plain nodes stay.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import Reshaped, cast, transposed
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import compute_type
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import QuantizedWeight, add_initializer, clean_up, quantized_weight, replace_node
from l4convert.quantization.recipe import Recipe

CONTRIB = "com.microsoft"
OP_TYPE = "MatMulBlockQuantizedFp8Weight"


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every ``MatMul`` whose second operand is a stored FP8 matrix, those in bodies of loops included."""
    outcome = Outcome()
    for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == "MatMul" and not n.domain]:
        weight = quantized_weight(node.inputs[1])
        if weight is None or node.graph is None or weight.values.dtype != ir.DataType.FLOAT8E4M3FN:
            continue
        if reason := _refusal(weight, compute_type(model.graph)):
            outcome.skip(node.name, reason)
            continue
        depth, width = weight.values.dims
        scales = Reshaped(cast(weight.scales, ir.DataType.FLOAT), [width, 1])
        b = Builder(node.name or "matmul")
        output = b.node(
            OP_TYPE,
            [
                node.inputs[0],
                add_initializer(model.graph, f"{weight.name}_nk", transposed(weight.values)),
                add_initializer(model.graph, f"{weight.name}_nk_scale", scales),
            ],
            domain=CONTRIB,
            block_size=depth,
        )
        replace_node(node.graph, node, b, output)
        model.graph.opset_imports.setdefault(CONTRIB, 1)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _refusal(weight: QuantizedWeight, compute: str) -> str | None:
    if len(weight.values.dims) != 2:
        return f"no 8-bit float kernel for weights of {len(weight.values.dims)} axes"
    if compute == "float32":
        return "the 8-bit float kernel computes in bfloat16 or float16 only"
    return None
