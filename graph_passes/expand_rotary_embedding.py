"""Expand rotary embedding: ``RotaryEmbedding`` becomes products and sums of pairs.

The builder of TensorRT-RTX 1.7 fails on its own rotary layer in any graph that has a loop ("ssa_validation() failed"),
and the experts are loops. It fuses the arithmetic as well.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up, replace_node
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every interleaved ``RotaryEmbedding`` [B,S,heads*D] whose tables were gathered before, [B,S,D/2]."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.op_type == "RotaryEmbedding" and n.domain == ""]:
        heads = node.attributes.get_int("num_heads", 0)
        if not node.attributes.get_int("interleaved", 0) or not heads or len(node.inputs) != 3:
            outcome.skip(node.name, "not interleaved, not of three axes, or with position ids")
            continue
        b = Builder(node.name or "rotary")
        x, cos, sin = (value for value in node.inputs if value is not None)  # none of the three is optional
        replace_node(model.graph, node, b, [rotate(b, x, cos, sin, heads)])
        outcome.fired += 1
    clean_up(model)
    return outcome


def rotate(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, heads: int) -> ir.Value:
    """``(a, b) -> (a cos - b sin, a sin + b cos)`` for each pair of neighbours (arXiv:2104.09864, equation 34).

    Args:
        b: Where the nodes go.
        x: [B,S,heads*D].
        cos: [B,S,D/2].
        sin: Likewise.
        heads: Number of heads.
    """
    pairs = b.reshape(x, [0, 0, heads, -1, 2])
    first, second = (b.op("Gather", pairs, b.constant(index), axis=4) for index in (0, 1))
    cos, sin = (b.op("Unsqueeze", table, b.constant([2])) for table in (cos, sin))
    rotated = (
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
        b.op("Add", b.op("Mul", first, sin), b.op("Mul", second, cos)),
    )
    joined = b.op("Concat", *(b.op("Unsqueeze", value, b.constant([4])) for value in rotated), axis=4)
    return b.reshape(joined, [0, 0, -1])
