"""Normalize linear layers: products with stored weights become ``MatMul`` with a matrix [K,N], however written.

``Gemm`` with a transposed weight, ``Transpose`` and ``Identity`` of weights: the transposition becomes part of the
tensor's recipe, so nothing is moved before the weight is written.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_initializer, clean_up, replace_node
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import named, stored_matrix
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Fold what happens to weights, then rewrite every ``Gemm`` of a stored weight."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.domain in ("", "ai.onnx")]:
        try:
            if node.op_type in ("Transpose", "Identity"):
                outcome.fired += _fold(model.graph, node)
            elif node.op_type == "Gemm":
                _to_matmul(model.graph, node)
                outcome.fired += 1
        except Mismatch as reason:
            outcome.skip(node.name, str(reason))
    clean_up(model)
    return outcome


def _fold(graph: ir.Graph, node: ir.Node) -> int:
    """Take the last two axes of a weight as swapped, through a ``Cast`` too; 1 where that was done."""
    source = node.inputs[0]
    if source is None or node.outputs[0].is_graph_output():
        return 0
    cast = source.producer()
    if cast is not None and cast.op_type == "Cast" and node.op_type == "Transpose":
        weight = stored_matrix(cast.inputs[0])
        if weight is None or not _swaps(node, weight) or len(source.uses()) != 1 or source.is_graph_output():
            return 0
        assert cast.inputs[0] is not None
        cast.replace_input_with(0, swapped(graph, cast.inputs[0], weight))
        source.shape = node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], source)
        return 1
    weight = stored_matrix(source)
    if weight is None:
        return 0
    if node.op_type == "Transpose":
        if not _swaps(node, weight):
            return 0
        node.replace_input_with(0, None)
        source = swapped(graph, source, weight)
    ir.convenience.replace_all_uses_with(node.outputs[0], source)
    return 1


def _swaps(node: ir.Node, weight: LazyTensor) -> bool:
    axes = list(range(len(weight.dims)))
    perm = list(node.attributes.get_ints("perm", axes[::-1]))
    return len(axes) >= 2 and perm == [*axes[:-2], axes[-1], axes[-2]]


def swapped(graph: ir.Graph, value: ir.Value, weight: LazyTensor) -> ir.Value:
    """A stored matrix with its last two axes swapped: the same one where nothing else uses it, else another."""
    result = transposed(weight)
    if len(value.uses()) > 1 or value.is_graph_output():
        tensor = result if result is not weight else weight
        return add_initializer(graph, f"{value.name}_t", tensor)
    result.name = value.name
    value.const_value, value.shape = result, ir.Shape(result.dims)
    return value


def _to_matmul(graph: ir.Graph, node: ir.Node) -> None:
    attributes = node.attributes
    if attributes.get_int("transA", 0) or attributes.get_float("alpha", 1.0) != 1.0:
        raise Mismatch("it transposes or scales its first operand")
    left, right = node.inputs[0], node.inputs[1]
    weight = stored_matrix(right)
    if left is None or right is None or weight is None or len(weight.dims) != 2:
        raise Mismatch(f"{named(right)} is not a stored matrix")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and attributes.get_float("beta", 1.0) != 1.0:
        raise Mismatch("it scales its bias")
    if attributes.get_int("transB", 0):
        right = swapped(graph, right, weight)
    b = Builder(node.name or "linear")
    dtype, shape = node.outputs[0].dtype, node.outputs[0].shape
    product = b.op("MatMul", left, right, name="product")
    if dtype is not None:
        product.type, product.shape = ir.TensorType(dtype), shape
    replace_node(graph, node, b, [product if bias is None else b.op("Add", product, bias, name="biased")])
