"""Lower attention to GroupQueryAttention: ONNX Runtime's kernel where it applies, the definition elsewhere.

The kernel (com.microsoft, CPU) takes several new tokens on top of a past for one sequence only, and in a static cache
it writes one contiguous run of slots. So each call becomes an ``If``: the kernel in the usual cases, and the plain
definition for a batch that continues with several tokens at once, and in a static cache for padding that is not at the
end and for calls that cross a chunk boundary. A plain causal kernel on lengths ``p mod C`` is chunked attention
(DESIGN section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import attention_calls, clean_up, replace_node
from l4convert.plugins.long_context_attention import definition, kv_cache
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Heads, Inputs
from l4convert.quantization.recipe import Recipe

CONTRIB = "com.microsoft"
Outputs = tuple[ir.Value, ir.Value, ir.Value]


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every call of ``l4convert::LongContextAttention``."""
    outcome = Outcome()
    for node, spec, inputs in attention_calls(model.graph):
        b = Builder(node.name or "attention")
        replacement = _choose(b, spec, inputs)
        replace_node(model.graph, node, b, replacement, CONTRIB)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _choose(b: Builder, spec: AttentionSpec, inputs: Inputs) -> tuple[ir.Value, ...]:
    applies = static_applies(b, spec, inputs) if spec.kv_cache == "static" else appended_applies(b, inputs)
    kernel, plain = Builder(f"{b.prefix}/kernel"), Builder(f"{b.prefix}/plain")
    lowered = static_kernel if spec.kv_cache == "static" else appended_kernel
    return b.node(
        "If",
        [applies],
        outputs=3,
        then_branch=_branch(kernel, "kernel", lowered(kernel, spec, inputs)),
        else_branch=_branch(plain, "plain", definition.build(plain, spec, inputs)),
    )


def _branch(b: Builder, name: str, outputs: Sequence[ir.Value]) -> ir.Graph:
    return ir.Graph([], outputs, nodes=b.nodes, name=name)


def appended_applies(b: Builder, inputs: Inputs) -> ir.Value:
    """Growing and windowed: one sequence, or one new token each, or no past."""
    one_sequence = b.op("Equal", b.dim(inputs.query, 0), b.constant([1]))
    one_token = b.op("Equal", b.dim(inputs.query, 1), b.constant([1]))
    no_past = b.op("Equal", b.dim(inputs.past_key, 2), b.constant([0]))
    return b.op("Or", b.op("Or", one_sequence, one_token), no_past)


def appended_kernel(b: Builder, spec: AttentionSpec, inputs: Inputs) -> Outputs:
    """The kernel on a past that ends where the new tokens begin; what a token may see is an additive mask."""
    heads = definition.prepare_heads(b, spec, inputs)
    past_key, past_value, held = inputs.past_key, inputs.past_value, inputs.positions
    if spec.chunk_size and spec.kv_cache == "growing":
        start = kv_cache.window_start(b, spec.chunk_size, held, heads.positions)
        past_key, past_value = (b.slice(x, start, None, axis=2) for x in (past_key, past_value))
        held = b.slice(held, start, None, axis=1)
    elif spec.chunk_size:
        slots = b.op("Add", b.dim(past_key, 2), b.dim(inputs.query, 1))
        held = b.slice(held, b.op("Neg", slots), None, axis=1)
    total = b.dim(held, 1)
    lengths = b.op("Expand", b.op("Sub", total, b.constant([1])), b.dim(inputs.query, 0))
    visible = definition.visibility(b, spec, heads.positions, held)
    bias = b.op("Where", visible, b.constant(0.0, np.float32), b.constant(np.finfo(np.float32).min, np.float32))
    bias = b.op("Unsqueeze", bias, b.constant([1]))
    merged, key, value = group_query_attention(b, spec, heads, past_key, past_value, lengths, total, bias)
    if spec.chunk_size and spec.kv_cache == "growing":
        new = (b.op("Transpose", x, perm=[0, 2, 1, 3]) for x in (heads.key, heads.value))
        key, value = (
            b.op("Concat", p, n, axis=2) for p, n in zip((inputs.past_key, inputs.past_value), new, strict=True)
        )
    elif spec.chunk_size:
        keep = kv_cache.next_chunk_start(b, spec.chunk_size, held)
        key, value = (b.slice(x, keep, None, axis=2) for x in (key, value))
    return merged, key, value


def static_applies(b: Builder, spec: AttentionSpec, inputs: Inputs) -> ir.Value:
    """Static: as above, and every sequence's new tokens fill slots in a row, inside one chunk and inside the buffer."""
    new, past_tokens, length, offset = _static_lengths(b, spec, inputs)
    end = b.op("Add", offset, new)
    room = b.dim(inputs.past_key, 2)
    if spec.chunk_size:
        room = b.op("Min", room, b.constant([spec.chunk_size]))
    fits = _all(b, b.op("LessOrEqual", end, room))
    positions = b.slice(inputs.positions, past_tokens, None, axis=1)
    order = b.op("Range", b.constant(0), b.op("Squeeze", new), b.constant(1))
    in_order = b.op("Equal", positions, b.op("Add", length, order))
    contiguous = _all(b, b.op("Or", in_order, b.op("Less", positions, b.constant(0))))
    one_sequence = b.op("Equal", b.dim(inputs.query, 0), b.constant([1]))
    one_token = b.op("Equal", new, b.constant([1]))
    no_past = b.op("Equal", b.op("ReduceMax", offset, keepdims=0), b.constant(0))
    shape_allows = b.op("Or", b.op("Or", one_sequence, one_token), no_past)
    return b.op("And", b.op("And", fits, contiguous), shape_allows)


def static_kernel(b: Builder, spec: AttentionSpec, inputs: Inputs) -> Outputs:
    """The kernel on buffers it writes in place: lengths are positions, in a chunked layer positions mod C."""
    heads = definition.prepare_heads(b, spec, inputs)
    new, _, _, offset = _static_lengths(b, spec, inputs)
    total = b.op("Add", b.op("ReduceMax", offset, keepdims=0), new)
    last = b.op("Sub", b.op("Add", b.op("Squeeze", offset, b.constant([1])), new), b.constant(1))
    return group_query_attention(b, spec, heads, inputs.past_key, inputs.past_value, last, total, None)


def _static_lengths(b: Builder, spec: AttentionSpec, inputs: Inputs) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """New tokens [1], mask slots before them [1], real tokens in the cache [B,1], and the slot they end at [B,1]."""
    new = b.dim(inputs.query, 1)
    past_tokens = b.op("Sub", b.dim(inputs.positions, 1), new)
    length = kv_cache.past_length(b, inputs.positions, past_tokens)
    offset = b.op("Mod", length, b.constant(spec.chunk_size)) if spec.chunk_size else length
    return new, past_tokens, length, offset


def _all(b: Builder, condition: ir.Value) -> ir.Value:
    """Whether every element of a bool tensor holds: bool [1]."""
    as_int = b.op("Cast", condition, to=int(ir.DataType.INT64))
    return b.op("Equal", b.op("ReduceMin", b.reshape(as_int, [-1]), keepdims=1), b.constant([1]))


def group_query_attention(
    b: Builder,
    spec: AttentionSpec,
    heads: Heads,
    past_key: ir.Value,
    past_value: ir.Value,
    last: ir.Value,
    total: ir.Value,
    bias: ir.Value | None,
) -> Outputs:
    """Append the contrib op.

    Args:
        last: int64 [B], the index of each sequence's last slot after the call.
        total: int64 [1], the largest number of slots after the call.
        bias: float32 [B,1,S,total] added to the scores, or None for plain causal attention.
    """
    flat = [b.reshape(x, [0, 0, -1]) for x in (heads.query, heads.key, heads.value)]
    last, total = (b.op("Cast", x, to=int(ir.DataType.INT32)) for x in (last, b.op("Squeeze", total)))
    optional = [None, None, None, bias] if bias is not None else []  # cos, sin, position ids, bias
    outputs = b.node(
        "GroupQueryAttention",
        [*flat, past_key, past_value, last, total, *optional],
        outputs=3,
        domain=CONTRIB,
        num_heads=spec.num_heads,
        kv_num_heads=spec.kv_num_heads,
        scale=spec.scale,
    )
    return outputs[0], outputs[1], outputs[2]
