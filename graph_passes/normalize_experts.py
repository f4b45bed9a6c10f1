"""Normalize experts: the routed experts as transformers computes them become the canonical form, which is then fused.

transformers' ``Llama4TextMoe`` (modeling_llama4.py) repeats every token for every expert, multiplies it with the
sigmoid of its logit, which is minus infinity where the expert was not chosen, and multiplies all of them with all
experts. The canonical form (plugins/moe/definition.py) gives the same sums, and fuse_experts finds it: then only the
experts that a token chose compute.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import compute_type
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up, float_weight, replace_outputs
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import (
    array_of,
    ints_of,
    is_made_by,
    made_by,
    named,
    operand,
    peel,
    require_perm,
    scalar_of,
    split_operands,
)
from l4convert.plugins.moe import definition
from l4convert.plugins.moe.definition import Inputs, MoESpec
from l4convert.quantization.recipe import Recipe

# The sigmoid of anything below is 0 in every type that a graph computes in.
_NOTHING = -1000.0


class _Experts(NamedTuple):
    """Routed experts in the graph: tokens [T,H], logits [T,E], the stacked weights, and the sum [T,H]."""

    top_k: int
    x: ir.Value
    logits: ir.Value
    gate_up: ir.Value
    down: ir.Value
    output: ir.Value


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Try every ``TopK`` whose choices are written into a table of scores."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.op_type == "TopK" and n.domain in ("", "ai.onnx")]:
        try:
            experts = _match(node)
        except Mismatch as reason:
            outcome.skip(node.name, str(reason))
            continue
        if experts is not None:
            _rewrite(model.graph, node, experts)
            outcome.fired += 1
    clean_up(model)
    return outcome


def _match(top_k: ir.Node) -> _Experts | None:
    """The experts behind a choice; None where they have the canonical form already."""
    scores = _scores(top_k)
    if scores is None:
        return None
    k = ints_of(top_k.inputs[1])
    if k is None or len(k) != 1:
        raise Mismatch("how many experts are chosen is not a constant")
    output = _sum_after(scores)
    up, down = _last_product(output)
    routed, gate_up = _swiglu_product(up)
    x = _routed_tokens(routed, scores, down)
    logits = top_k.inputs[0]
    assert logits is not None  # TopK's first input is not optional
    _require_shapes(gate_up, down, logits)
    return _Experts(k[0], x, logits, gate_up, down, output)


def _scores(top_k: ir.Node) -> ir.Value | None:
    """sigmoid of the chosen logits, 0 elsewhere: [T,E]; None for the canonical form of it."""
    values, index = top_k.outputs[0], top_k.outputs[1]
    scatter = next((n for n, place in index.uses() if n.op_type == "ScatterElements" and place == 1), None)
    if scatter is None:
        raise Mismatch("the chosen logits are not scattered into a table of scores")
    updates = scatter.inputs[2]
    if updates is not values:
        if is_made_by(updates, "Sigmoid"):
            return None
        raise Mismatch("what is scattered is not the chosen logits")
    if top_k.attributes.get_int("largest", 1) == 0 or scatter.attributes.get_string("reduction", "none") != "none":
        raise Mismatch("the smallest logits are chosen, or scores are added up")
    if top_k.attributes.get_int("axis", -1) not in (1, -1) or scatter.attributes.get_int("axis", 0) not in (1, -1):
        raise Mismatch("experts are not on the last axis of the logits")
    filler = _filler(scatter.inputs[0])
    if filler is None or not filler <= _NOTHING:
        raise Mismatch("experts that were not chosen have a score that is not 0")
    value = scatter.outputs[0]
    for op_type in ("Cast", "Sigmoid", "Cast"):
        users = [n for n, _ in value.uses()]
        if len(users) == 1 and users[0].op_type == op_type:
            value = users[0].outputs[0]
        elif op_type == "Sigmoid":
            raise Mismatch(f"{named(value)} is not followed by one Sigmoid")
    return value


def _filler(value: ir.Value | None) -> float | None:
    """The number that a table is filled with."""
    node = value.producer() if value is not None else None
    if node is None:
        table = array_of(value)
        return float(table.flat[0]) if table is not None and len(np.unique(table)) == 1 else None
    if node.op_type == "ConstantOfShape":
        given = node.attributes.get("value")
        return float(given.as_tensor().numpy().reshape(-1)[0]) if given is not None else 0.0
    return scalar_of(node.inputs[0]) if node.op_type == "Expand" else None


def _sum_after(scores: ir.Value) -> ir.Value:
    """The sum over experts, downstream of the scores."""
    value = scores
    for _ in range(24):
        users = list(value.uses())
        if not users:
            break
        node = users[0][0]
        value = node.outputs[0]
        if node.op_type == "ReduceSum":
            axes = ints_of(node.inputs[1]) if len(node.inputs) > 1 else None
            keeps = node.attributes.get_int("keepdims", 1)
            if axes != [0] or keeps:
                raise Mismatch("the sum is not over the experts")
            return value
    raise Mismatch(f"{named(scores)} does not lead to a sum over experts")


def _last_product(output: ir.Value) -> tuple[ir.Value, ir.Value]:
    product = made_by(peel(operand(made_by(output, "ReduceSum")), "Reshape", "Cast"), "MatMul")
    hidden, down = product.inputs[0], product.inputs[1]
    assert hidden is not None
    assert down is not None
    return hidden, down


def _swiglu_product(hidden: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Back over ``up * gate * sigmoid(gate)`` and the split: the routed tokens, and gate_up."""
    outer = made_by(peel(hidden, "Cast"), "Mul")
    silu, up = _peeled_pair(outer, "Mul")
    sigmoid, gate = _peeled_pair(made_by(silu, "Mul"), "Sigmoid")
    if peel(operand(made_by(sigmoid, "Sigmoid")), "Cast") is not gate:
        raise Mismatch(f"{named(silu)} is not a SiLU")
    split = made_by(gate, "Split")
    last = split.attributes.get_int("axis", 0) in (-1, 2)
    parts = split.attributes.get_int("num_outputs", 0) == 2 and len(split.inputs) == 1
    sizes = ints_of(split.inputs[1]) if len(split.inputs) > 1 else None
    equal = parts or (sizes is not None and len(sizes) == 2 and sizes[0] == sizes[1])
    if not last or not equal or (gate, up) != tuple(split.outputs):
        raise Mismatch("gate and up are not the first and second half of one product")
    product = made_by(operand(split), "MatMul")
    routed, gate_up = product.inputs[0], product.inputs[1]
    assert routed is not None
    assert gate_up is not None
    return routed, gate_up


def _peeled_pair(node: ir.Node, op_type: str) -> tuple[ir.Value, ir.Value]:
    """The operands of a product without casts: first the one that such a node gives."""
    pair = [peel(x, "Cast") for x in node.inputs if x is not None]
    for one, other in (pair, pair[::-1]):
        if is_made_by(one, op_type):
            return one, other
    raise Mismatch(f"no {op_type} goes into {node.op_type} {named(node.outputs[0])}")


def _routed_tokens(routed: ir.Value, scores: ir.Value, down: ir.Value) -> ir.Value:
    """Back over ``repeat(x) * scores.T``, as rows of all experts, to x."""
    weight = float_weight(down)
    if weight is None or len(weight.tensor.dims) != 3:
        raise Mismatch("the experts' weights are not stored tensors")
    experts, _, hidden = weight.tensor.dims
    reshape = made_by(peel(routed, "Cast"), "Reshape")
    if ints_of(reshape.inputs[1]) != [experts, -1, hidden]:
        raise Mismatch("tokens are not grouped by expert")
    repeated, factor = split_operands(made_by(peel(operand(reshape), "Cast"), "Mul"), "Tile")
    column = made_by(peel(factor, "Cast"), "Reshape")
    if (ints_of(column.inputs[1]) or [])[1:] != [1]:  # before it the number of rows, or -1
        raise Mismatch("scores are not one a row")
    turned = made_by(operand(column), "Transpose")
    require_perm(turned, [1, 0])
    if operand(turned) is not scores:
        raise Mismatch(f"{named(turned.inputs[0])} stands where {named(scores)} should")
    tile = made_by(repeated, "Tile")
    if ints_of(tile.inputs[1]) != [experts, 1]:
        raise Mismatch("tokens are not repeated once for every expert")
    source = operand(tile)
    expand = source.producer()
    if expand is not None and expand.op_type == "Expand" and set(ints_of(expand.inputs[1]) or [0]) == {1}:
        source = operand(expand)
    return source


def _require_shapes(gate_up: ir.Value, down: ir.Value, logits: ir.Value) -> None:
    first, second = float_weight(gate_up), float_weight(down)
    if first is None or second is None:
        raise Mismatch("the experts' weights are not stored tensors")
    experts, width, hidden = second.tensor.dims
    if first.tensor.dims != (experts, hidden, 2 * width):
        raise Mismatch(f"{first.name} has shape {list(first.tensor.dims)}, not {[experts, hidden, 2 * width]}")
    if logits.shape is None or logits.shape[-1] != experts:
        raise Mismatch(f"{named(logits)} does not have a logit for each of {experts} experts")


def _rewrite(graph: ir.Graph, top_k: ir.Node, experts: _Experts) -> None:
    down = float_weight(experts.down)
    assert down is not None  # _require_shapes saw it
    count, width, hidden = down.tensor.dims
    spec = MoESpec(count, hidden, width, experts.top_k, compute=compute_type(graph))
    b = Builder(f"{top_k.name or 'experts'}/canonical")
    logits = experts.logits
    if logits.dtype != ir.DataType.FLOAT:
        logits = b.op("Cast", logits, to=int(ir.DataType.FLOAT))
    output = definition.build(b, spec, Inputs(experts.x, logits, experts.gate_up, experts.down))
    after = experts.output.producer()
    assert after is not None
    graph.insert_before(after, b.nodes)
    replace_outputs([experts.output], [output])
