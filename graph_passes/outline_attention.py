"""Outline attention: each layer's attention becomes a call of ``l4convert::LongContextAttention``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import ComputeType, compute_type
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_function, attributes_of, clean_up, replace_outputs
from l4convert.graph_passes.matching import Match, Mismatch, constant_of
from l4convert.plugins.long_context_attention import definition
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Inputs, KvCache
from l4convert.quantization.recipe import Recipe


class Pattern(NamedTuple):
    """The definition with loose ends: values to bind, and the nodes, which become the function's body."""

    spec: AttentionSpec
    inputs: Inputs
    outputs: tuple[ir.Value, ir.Value, ir.Value]
    body: Builder


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Match every ``Attention`` node and what surrounds it against the definition, in every form of the cache."""
    outcome = Outcome()
    for node in [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]:
        try:
            pattern, match = _match(node, compute_type(model.graph))
        except Mismatch as reason:
            outcome.skip(node.name, str(reason))
            continue
        _outline(model, node, pattern, match)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _match(node: ir.Node, compute: ComputeType) -> tuple[Pattern, Match]:
    reasons = []
    for kv_cache in get_args(KvCache):
        try:
            pattern = make_pattern(read_spec(node, kv_cache, compute))
            match = Match([x for x in pattern.inputs if x is not None])
            merged = _only_user(_only_user(node.outputs[0], "Transpose"), "Reshape")
            match.unify(pattern.outputs[0], merged)
            for output in pattern.outputs[1:]:
                match.find(output)
        except Mismatch as reason:
            reasons.append(f"{kv_cache}: {reason}")
        else:
            return pattern, match
    raise Mismatch("; ".join(dict.fromkeys(reasons)))


def make_pattern(spec: AttentionSpec) -> Pattern:
    """Build the definition over fresh inputs."""
    names = definition.input_names(spec)
    inputs = Inputs(**{name: ir.Value(name=name) if name in names else None for name in Inputs._fields})  # type: ignore[arg-type]
    body = Builder()
    return Pattern(spec, inputs, definition.build(body, spec, inputs), body)


def _outline(model: ir.Model, node: ir.Node, pattern: Pattern, match: Match) -> None:
    arguments = [x for x in pattern.inputs if x is not None]
    results = [match[x] for x in pattern.outputs]
    inputs = [match[x] for x in arguments]
    overload = add_function(
        model, definition.DOMAIN, definition.OP_TYPE, pattern.spec, arguments, pattern.body, pattern.outputs
    )
    caller = Builder()
    outputs = caller.node(
        definition.OP_TYPE,
        inputs,
        outputs=3,
        name=(node.name or "").rpartition("/")[0] + "/attention",
        domain=definition.DOMAIN,
        overload=overload,
        **attributes_of(pattern.spec),
    )
    model.graph.extend(caller.nodes)  # clean_up orders the nodes
    replace_outputs(results, outputs)


def read_spec(node: ir.Node, kv_cache: KvCache, compute: ComputeType = "float32") -> AttentionSpec:
    """The attributes that the nodes around an ``Attention`` node would have to have been built from.

    Only a guess: the match that follows compares every node with the definition for these attributes.

    Raises:
        Mismatch: A part of the definition is not there at all.
    """
    query, _, _, mask = [*node.inputs, None][:4]
    if mask is None:
        raise Mismatch("no attention mask")
    query_ops = {n.op_type: n for n in _chain(query)}
    heads = _heads(query_ops)
    key_heads = _heads({n.op_type: n for n in _chain(node.inputs[1])})
    norm, scaled = query_ops.get("RMSNormalization"), query_ops.get("Mul")
    floor_scale, attn_scale = _temperature(scaled) if scaled else (1.0, 0.0)
    return AttentionSpec(
        num_heads=heads[0],
        kv_num_heads=key_heads[0],
        head_dim=heads[1],
        chunk_size=_chunk_size(mask),
        rope="RotaryEmbedding" in query_ops,
        qk_norm_eps=norm.attributes.get_float("epsilon", 1e-5) if norm else 0.0,
        floor_scale=floor_scale,
        attn_scale=attn_scale,
        kv_cache=kv_cache,
        compute=compute,
    )


def _chain(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes upstream along data inputs, to the projection; the new tokens' branch where caches are joined."""
    while value is not None and (node := value.producer()) is not None and node.op_type != "MatMul":
        yield node
        if not node.inputs:
            return
        value = node.inputs[-1] if node.op_type == "Concat" else node.inputs[0]


def _heads(ops: dict[str, ir.Node]) -> tuple[int, int]:
    shape = constant_of(ops["Reshape"].inputs[1]) if "Reshape" in ops else None
    if shape is None or shape.size != 4:
        raise Mismatch("no Reshape that splits heads")
    return int(shape[2]), int(shape[3])


def _chunk_size(mask: ir.Value) -> int:
    """The divisor of the segments in the mask; 0 where there is none."""
    frontier = [mask]
    for _ in range(6):
        nodes = [n for v in frontier if (n := v.producer()) is not None]
        for node in nodes:
            if node.op_type == "Div" and (divisor := constant_of(node.inputs[1])) is not None:
                return int(divisor)
        frontier = [v for n in nodes for v in n.inputs if v is not None]
    return 0


def _temperature(node: ir.Node) -> tuple[float, float]:
    """(floor_scale, attn_scale) of ``query * (1 + attn_scale * ln(1 + floor(count / floor_scale)))``."""
    value = node.inputs[1]
    constants: dict[str, float] = {}
    while value is not None and (producer := value.producer()) is not None and producer.op_type != "Cast":
        if (
            len(producer.inputs) > 1
            and (constant := constant_of(producer.inputs[1])) is not None
            and constant.size == 1
        ):
            constants[producer.op_type] = float(np.float32(constant.reshape(-1)[0]))
        value = producer.inputs[0] if producer.inputs else None
    if not {"Div", "Mul"} <= constants.keys():
        raise Mismatch("the query is scaled by something other than the temperature")
    return constants["Div"], constants["Mul"]


def _only_user(value: ir.Value, op_type: str) -> ir.Value:
    users = [n for n, _ in value.uses()]
    if len(users) != 1 or users[0].op_type != op_type:
        raise Mismatch(f"{value.name} is not followed by one {op_type}")
    return users[0].outputs[0]
