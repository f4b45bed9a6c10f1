"""Store weights in the type they are computed with, where that is not wider: a ``Cast`` less, and often half the bytes.

A GPU runtime computes in 16 bits, so a float32 checkpoint needs no float32 copy there. BF16 weights that are computed
with in float32 (the router) stay as they are.
"""

from __future__ import annotations

import onnx_ir as ir

from l4convert.checkpoint.combiners import cast
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_initializer, clean_up
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace each ``Cast`` of a stored weight, to a type of no more bytes, by a stored weight of that type."""
    outcome = Outcome()
    stored: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in [n for n in model.graph if n.op_type == "Cast" and n.domain == ""]:
        weight, dtype = node.inputs[0], ir.DataType(node.attributes["to"].as_int())
        if weight is None or not isinstance(tensor := weight.const_value, LazyTensor):
            continue
        if dtype.itemsize > tensor.dtype.itemsize:
            outcome.skip(weight.name, f"{tensor.dtype} is stored and {dtype} computed with, which is wider")
            continue
        if (weight, dtype) not in stored:
            stored[weight, dtype] = add_initializer(model.graph, f"{weight.name}_{dtype}", cast(tensor, dtype))
        ir.convenience.replace_all_uses_with(node.outputs[0], stored[weight, dtype])
        outcome.fired += 1
    names = _drop_unused(model.graph, {weight for weight, _ in stored})
    for (weight, _), narrow in stored.items():
        if weight in names:
            narrow.name = names.pop(weight)
    clean_up(model)
    return outcome


def _drop_unused(graph: ir.Graph, weights: set[ir.Value]) -> dict[ir.Value, str]:
    """Drop weights that only a removed cast used; returns their names, which the new ones can have."""
    for node in [n for n in graph if n.op_type == "Cast" and not n.outputs[0].uses()]:
        if not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    names = {weight: weight.name for weight in weights if not weight.uses() and weight.name is not None}
    for name in names.values():
        del graph.initializers[name]
    return names
