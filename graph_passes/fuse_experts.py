"""Fuse experts: routed experts become a call of ``l4convert::MoE`` over stacked weights.

Two forms are known: experts already stacked, and one matrix product for each expert, whose weights are stacked here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from l4convert.checkpoint.combiners import SideBySide, Stacked
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import compute_type
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    Weight,
    add_function,
    add_initializer,
    attributes_of,
    clean_up,
    float_weight,
    replace_outputs,
    widened,
)
from l4convert.graph_passes.matching import Match, Mismatch, constant_of
from l4convert.plugins.moe import definition
from l4convert.plugins.moe.definition import Expert, Inputs, MoESpec
from l4convert.quantization.recipe import Recipe


class Found(NamedTuple):
    """One set of experts in the graph: the call's inputs and the value that the call replaces."""

    spec: MoESpec
    inputs: Inputs
    output: ir.Value


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Try both forms at every ``TopK``."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.op_type == "TopK" and n.domain == ""]:
        try:
            found = _find(model.graph, node)
        except Mismatch as reason:
            outcome.skip(node.name, str(reason))
            continue
        call(model, found, (node.name or "").rpartition("/")[0])
        outcome.fired += 1
    clean_up(model)
    return outcome


def _find(graph: ir.Graph, top_k: ir.Node) -> Found:
    k = constant_of(top_k.inputs[1])
    scores = next((n.outputs[0] for n, i in top_k.outputs[1].uses() if n.op_type == "ScatterElements" and i == 1), None)
    if k is None or scores is None:
        raise Mismatch("the chosen logits are not scattered into a table of scores")
    users = [n for n, _ in scores.uses()]
    top, compute = int(k.reshape(-1)[0]), compute_type(graph)
    if users and all(n.op_type == "Gather" for n in users):
        return _unfused(graph, MoESpec(len(users), 0, 0, top, compute=compute), scores)
    return _stacked(MoESpec(0, 0, 0, top, compute=compute), scores)


def _stacked(spec: MoESpec, scores: ir.Value) -> Found:
    output = _follow(scores, "ReduceSum", 1)
    inputs = Inputs(*(ir.Value(name=name) for name in Inputs._fields))
    match = Match(inputs)
    match.unify(definition.build(Builder(), spec, inputs), output)
    bound = Inputs(*(match[x] for x in inputs))
    _require_same_router(bound.router_logits, scores)
    down = float_weight(bound.down)
    if down is None or len(down.tensor.dims) != 3 or float_weight(bound.gate_up) is None:
        raise Mismatch("the experts' weights are not stored tensors")
    experts, width, hidden = down.tensor.dims
    spec = dataclasses.replace(spec, num_experts=experts, hidden_size=hidden, intermediate_size=width)
    return Found(spec, bound, output)


def _unfused(graph: ir.Graph, spec: MoESpec, scores: ir.Value) -> Found:
    count = spec.num_experts
    output = _follow(scores, "Add", count - 1) if count > 1 else _follow(scores, "MatMul", 2)
    x, logits = ir.Value(name="x"), ir.Value(name="router_logits")
    experts = [Expert(*(ir.Value(name=f"{n}_{e}") for n in Expert._fields)) for e in range(count)]
    match = Match([x, logits, *(w for e in experts for w in e)])
    pattern = definition.build_unfused(Builder(), spec, x, logits, experts)
    match.unify(pattern, output)
    _require_same_router(match[logits], scores)
    _require_all_experts(match[logits], count)
    weights = [[_stored(match[w]) for w in expert] for expert in experts]
    kinds = {(w.tensor.dtype, w.dtype) for expert in weights for w in expert}
    shapes = {tuple(w.tensor.dims for w in expert) for expert in weights}
    if len(kinds) != 1 or len(shapes) != 1:
        raise Mismatch("the experts' weights are of different dtypes or shapes")
    prefix = re.sub(r"\.\d+\.[^.]*_proj\.weight$", "", weights[0][0].name)
    gate_up = Stacked([SideBySide([gate.tensor, up.tensor]) for gate, up, _ in weights])
    down = Stacked([down.tensor for _, _, down in weights])
    b = Builder(prefix)
    stacked = [
        _widened(b, graph, f"{prefix}.{n}", t, weights[0][0])
        for n, t in (("gate_up_proj", gate_up), ("down_proj", down))
    ]
    graph.extend(b.nodes)
    _, width, hidden = down.dims
    spec = dataclasses.replace(spec, hidden_size=hidden, intermediate_size=width)
    return Found(spec, Inputs(match[x], match[logits], *stacked), output)


def _require_same_router(router_logits: ir.Value, scores: ir.Value) -> None:
    """What was found downstream may be the experts of a later layer."""
    top_k = scores.producer().inputs[1].producer()  # type: ignore[union-attr]  # how _find came to the scores
    if top_k is None or top_k.inputs[0] is not router_logits:
        raise Mismatch(f"{scores.name} leads to other experts than its own, those of {router_logits.name}")


def _require_all_experts(router_logits: ir.Value, count: int) -> None:
    """A table of scores that is wider than the sum would send tokens to experts that the call does not have."""
    router = router_logits.producer()
    weight = float_weight(router.inputs[1]) if router is not None and router.op_type == "MatMul" else None
    if weight is None:
        raise Mismatch(f"{router_logits.name} is not the product with a stored router")
    if weight.tensor.dims[-1] != count:
        raise Mismatch(f"{count} of the router's {weight.tensor.dims[-1]} experts are summed")


def _stored(value: ir.Value) -> Weight:
    weight = float_weight(value)
    if weight is None or len(weight.tensor.dims) != 2:
        raise Mismatch(f"{value.name} is not a stored matrix")
    return weight


def _widened(b: Builder, graph: ir.Graph, name: str, tensor: LazyTensor, like: Weight) -> ir.Value:
    return widened(b, add_initializer(graph, name, tensor), like)


def _follow(value: ir.Value, op_type: str, times: int) -> ir.Value:
    """Downstream along first users until ``op_type`` was met ``times`` times."""
    for _ in range(times):
        while True:
            users: Sequence[tuple[ir.Node, int]] = value.uses()  # type: ignore[assignment]
            node = next((n for n, _ in users), None)
            if node is None:
                raise Mismatch(f"{value.name} does not lead to {op_type}")
            value = node.outputs[0]
            if node.op_type == op_type:
                break
    return value


def call(model: ir.Model, found: Found, scope: str) -> None:
    """Replace what was found by a call; the function is added where the model does not have it."""
    overload = declare(model, found.spec)
    caller = Builder()
    outputs = caller.node(
        definition.OP_TYPE,
        found.inputs,
        name=f"{scope}/moe",
        domain=definition.DOMAIN,
        overload=overload,
        **attributes_of(found.spec),
    )
    model.graph.extend(caller.nodes)  # clean_up orders the nodes
    replace_outputs([found.output], outputs)


def declare(model: ir.Model, spec: MoESpec) -> str:
    """Add the function of a spec to the model, unless it is there; returns its overload."""
    body = Builder()
    inputs = Inputs(*(ir.Value(name=name) for name in Inputs._fields))
    output = definition.build(body, spec, inputs)
    return add_function(model, definition.DOMAIN, definition.OP_TYPE, spec, inputs, body, [output])
