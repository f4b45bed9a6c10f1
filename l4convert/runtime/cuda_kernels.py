"""What ONNX Runtime's CUDA kernels do and its CPU kernels do not (1.31), as other nodes: a part of the CPU form."""

from __future__ import annotations

import onnx_ir as ir

from l4convert.frontend.builder import Builder

_QUERY, _KEY = 0, 1
_WEIGHTS = (14, 15)  # q_norm_weight and k_norm_weight in the op's schema
_EPSILON = "qk_norm_epsilon"


def has_cuda_kernels(model: ir.Model) -> bool:
    """Whether the CPU provider would refuse a node of a graph, or of a branch or loop in it, for that reason."""
    return any(_norms(n) or _has_fp8_weight(n) for n in ir.traversal.RecursiveGraphIterator(model.graph))


def replace_cuda_kernels(model: ir.Model) -> None:
    """Rewrite those nodes in place."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if _norms(node):
            _norm_in_front(node)
        elif _has_fp8_weight(node):
            _dequantize_in_front(node)


def _norms(node: ir.Node) -> bool:
    if node.op_type != "GroupQueryAttention" or len(node.inputs) <= max(_WEIGHTS):
        return False
    return node.inputs[_WEIGHTS[0]] is not None


def _has_fp8_weight(node: ir.Node) -> bool:
    return node.op_type == "MatMulBlockQuantizedFp8Weight"


def _norm_in_front(node: ir.Node) -> None:
    """GroupQueryAttention norms before it rotates, so what it rotates may as well come with the norm."""
    b = Builder(f"{node.name}/norm")
    epsilon = node.attributes[_EPSILON].as_float()
    for index, weight, count in zip((_QUERY, _KEY), _WEIGHTS, ("num_heads", "kv_num_heads"), strict=True):
        heads = b.reshape(_given(node, index), [0, 0, node.attributes[count].as_int(), -1])
        normed = b.op("RMSNormalization", heads, node.inputs[weight], axis=-1, epsilon=epsilon)
        node.replace_input_with(index, b.reshape(normed, [0, 0, -1]))
        node.replace_input_with(weight, None)
    del node.attributes[_EPSILON]
    _insert_before(node, b)


def _dequantize_in_front(node: ir.Node) -> None:
    """The weight [N,K] with one scale a row [N,1], in the type of the activations, transposed."""
    b = Builder(f"{node.name}/plain")
    scale = b.op("Squeeze", _given(node, 2), b.constant([1]))
    weight = b.op("CastLike", b.op("DequantizeLinear", node.inputs[1], scale, axis=0), node.inputs[0])
    product = b.op("MatMul", node.inputs[0], b.op("Transpose", weight, perm=[1, 0]))
    _insert_before(node, b)
    result = node.outputs[0]
    product.name, product.type, product.shape = result.name, result.type, result.shape
    ir.convenience.replace_all_uses_with(result, product, replace_graph_outputs=True)
    assert node.graph is not None  # as above
    node.graph.remove(node, safe=True)


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # the schema requires it
    return value


def _insert_before(node: ir.Node, b: Builder) -> None:
    assert node.graph is not None  # it was found in one
    node.graph.insert_before(node, b.nodes)
