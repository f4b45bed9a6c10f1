"""GroupQueryAttention's QK norm as nodes of its own: the CPU provider's kernel rotates, but does not norm (1.31)."""

from __future__ import annotations

import onnx_ir as ir

from l4convert.frontend.builder import Builder

_QUERY, _KEY = 0, 1
_WEIGHTS = (14, 15)  # q_norm_weight, k_norm_weight in the op's schema
_EPSILON = "qk_norm_epsilon"


def needs_norm_in_front(model: ir.Model) -> bool:
    """Whether any GroupQueryAttention of a graph, or of a branch in it, norms query and key itself."""
    return any(_norms(node) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def norm_in_front(model: ir.Model) -> None:
    """Take the norm out of every GroupQueryAttention and put it in front; the kernel, too, norms before it rotates."""
    for node in [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if _norms(n)]:
        graph = node.graph
        assert graph is not None  # it was found in one
        b = Builder(f"{node.name}/norm")
        epsilon = node.attributes[_EPSILON].as_float()
        heads = (node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int())
        normed = []
        for index, weight, count in zip((_QUERY, _KEY), _WEIGHTS, heads, strict=True):
            split = b.reshape(node.inputs[index], [0, 0, count, -1])  # type: ignore[arg-type]  # neither is optional here
            value = b.op("RMSNormalization", split, node.inputs[weight], axis=-1, epsilon=epsilon)
            normed.append(b.reshape(value, [0, 0, -1]))
        graph.insert_before(node, b.nodes)
        for index, value in zip((_QUERY, _KEY), normed, strict=True):
            node.replace_input_with(index, value)
        for index in _WEIGHTS:
            node.replace_input_with(index, None)
        del node.attributes[_EPSILON]


def _norms(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and len(node.inputs) > max(_WEIGHTS) and node.inputs[14] is not None
