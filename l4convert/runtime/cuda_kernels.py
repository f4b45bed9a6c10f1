"""What ONNX Runtime's CUDA kernels do and its CPU kernels do not (1.31), as other nodes: a part of the CPU form."""

from __future__ import annotations

import onnx_ir as ir

from l4convert.frontend.builder import Builder

_QUERY, _KEY, _PAST = 0, 1, 3
_WEIGHTS = (14, 15)  # q_norm_weight and k_norm_weight in the op's schema
_EPSILON = "qk_norm_epsilon"


def has_cuda_kernels(model: ir.Model) -> bool:
    """Whether the CPU provider would refuse a node of a graph, or of a branch or loop in it, for that reason."""
    return any(
        _norms(n) or _has_fp8_weight(n) or _has_fp8_cache(n) for n in ir.traversal.RecursiveGraphIterator(model.graph)
    )


def replace_cuda_kernels(model: ir.Model) -> None:
    """Rewrite those nodes in place."""
    for node in list(model.graph):
        if node.op_type == "If" and any(map(_has_fp8_cache, node.attributes["then_branch"].as_graph())):
            _take_the_other_branch(node)
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


def _has_fp8_cache(node: ir.Node) -> bool:
    if node.op_type != "GroupQueryAttention" or (cache := node.inputs[_PAST]) is None:
        return False
    while (producer := cache.producer()) is not None and producer.op_type == "Reshape":
        cache = _given(producer, 0)
    return cache.dtype == ir.DataType.FLOAT8E4M3FN


def _take_the_other_branch(node: ir.Node) -> None:
    """The kernel stands behind an If (docs/adr/0004); the other branch is the definition, and does every call."""
    branch, graph = node.attributes["else_branch"].as_graph(), node.graph
    assert graph is not None  # as above
    results, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}/replaced"
    ir.convenience.replace_all_uses_with(node.outputs, results, replace_graph_outputs=True)
    graph.remove(node, safe=True)


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
