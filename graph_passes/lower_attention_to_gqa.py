"""Lower attention to GroupQueryAttention: ONNX Runtime's kernel where it applies, the definition elsewhere.

The kernel (com.microsoft) takes several new tokens on top of a past for one sequence only, and in a static cache it
writes one contiguous run of slots. So each call becomes an ``If``: the kernel in the usual cases, and the plain
definition for a batch that continues with several tokens at once, and in a static cache for padding that is not at the
end and for calls that cross a chunk boundary. A plain causal kernel on lengths ``p mod C`` is chunked attention
(DESIGN section 4).

What else a kernel can do differs between providers (``providers``). Where it has no fast way to add a mask, it is taken
only where plain causal attention is right. Where it prepares heads itself, it is given the projections, the rotary
tables, and a norm whose weights are ones.

What the kernel is told about a call, and whether it can do it, is computed once for all layers of a kind: they see the
same tokens, and their caches are of one size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, from_float32, to_float32
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import attention_calls, clean_up, replace_node
from l4convert.graph_passes.group_query_attention import CONTRIB, Call, Outputs, group_query_attention
from l4convert.graph_passes.providers import CPU, Provider
from l4convert.plugins.long_context_attention import definition, kv_cache, quantized
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Heads, Inputs
from l4convert.quantization.recipe import Recipe


def run(model: ir.Model, recipe: Recipe, provider: Provider = CPU) -> Outcome:
    """Replace every call of ``l4convert::LongContextAttention`` that the provider's kernel can do."""
    outcome = Outcome()
    calls: dict[AttentionSpec, Call] = {}
    for node, spec, inputs in attention_calls(model.graph):
        if reason := provider.refuses_attention(spec):
            outcome.skip(node.name, reason)
            continue
        b = Builder(node.name or "attention")
        if spec not in calls:
            calls[spec] = _call(b, spec, inputs, provider)
        replacement = _choose(b, spec, inputs, calls[spec], provider)
        replace_node(model.graph, node, b, replacement, CONTRIB)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _call(b: Builder, spec: AttentionSpec, inputs: Inputs, provider: Provider) -> Call:
    if spec.kv_cache == "static":
        call = static_call(b, spec, inputs, provider)
    else:
        call = appended_call(b, spec, inputs, provider.fast_bias or spec.kv_cache == "windowed")
    if spec.rope and _prepares(provider, spec, call):
        tables = (from_float32(b, x, spec.compute) for x in (inputs.cos, inputs.sin) if x is not None)
        call = call._replace(tables=tuple(tables))
    last, total = (b.op("Cast", x, to=int(ir.DataType.INT32)) for x in (call.last, b.op("Squeeze", call.total)))
    return call._replace(last=last, total=total)


def _prepares(provider: Provider, spec: AttentionSpec, call: Call) -> bool:
    """Whether the kernel rotates and norms. It rotates by slots, which are positions only where no mask is needed."""
    return provider.prepares(spec) and not call.masked


def _choose(b: Builder, spec: AttentionSpec, inputs: Inputs, call: Call, provider: Provider) -> tuple[ir.Value, ...]:
    kernel, plain = Builder(f"{b.prefix}/kernel"), Builder(f"{b.prefix}/plain")
    prepares = _prepares(provider, spec, call)
    # All but the temperature is left to a kernel that prepares heads.
    outside = dataclasses.replace(spec, rope=False, qk_norm_eps=0.0) if prepares else spec
    heads = definition.prepare_heads(kernel, outside, inputs)
    if provider.rounds_late and spec.kv_dtype != "none":
        heads = rounded_heads(kernel, spec, inputs, heads)
    lowered = static_kernel if spec.kv_cache == "static" else appended_kernel
    return b.node(
        "If",
        [call.applies],
        outputs=3,
        then_branch=_branch(kernel, "kernel", lowered(kernel, spec, inputs, heads, call, prepares)),
        else_branch=_branch(plain, "plain", definition.build(plain, spec, inputs)),
    )


def rounded_heads(b: Builder, spec: AttentionSpec, inputs: Inputs, heads: Heads) -> Heads:
    """New keys and values as the cache will have them, so that it does not matter when the kernel rounds them."""
    assert spec.kv_dtype != "none"

    def rounded(values: ir.Value, scale: ir.Value | None) -> ir.Value:
        scale = b.op("Reshape", scale, b.constant([1, 1, spec.kv_num_heads, spec.head_dim]))  # heads are [B,S,Hk,D]
        codes = quantized.codes_of(b, spec.kv_dtype, to_float32(b, values, spec.compute), scale)  # type: ignore[arg-type]
        return from_float32(b, b.op("Mul", codes, scale), spec.compute)

    return heads._replace(key=rounded(heads.key, inputs.key_scale), value=rounded(heads.value, inputs.value_scale))


def _branch(b: Builder, name: str, outputs: Sequence[ir.Value]) -> ir.Graph:
    return ir.Graph([], outputs, nodes=b.nodes, name=name)


def appended_call(b: Builder, spec: AttentionSpec, inputs: Inputs, masked: bool) -> Call:
    """Growing and windowed: one sequence, or one new token each, or no past.

    Args:
        masked: The kernel is given a mask. Otherwise the slots it attends to must hold one token after the other, from
            the sequence's first on, or from its chunk's: what is visible is then what is causal. Padding may end a row.
    """
    start, held = None, inputs.positions
    if spec.chunk_size and spec.kv_cache == "growing":
        new_tokens = b.op("Neg", b.dim(inputs.query, 1))
        start = kv_cache.window_start(b, spec.chunk_size, held, b.slice(inputs.positions, new_tokens, None, axis=1))
        held = b.slice(held, start, None, axis=1)
    elif spec.chunk_size:
        slots = b.op("Add", b.dim(inputs.past_key, 2), b.dim(inputs.query, 1))
        held = b.slice(held, b.op("Neg", slots), None, axis=1)
    total = b.dim(held, 1)
    one_sequence = b.op("Equal", b.dim(inputs.query, 0), b.constant([1]))
    one_token = b.op("Equal", b.dim(inputs.query, 1), b.constant([1]))
    no_past = b.op("Equal", b.dim(inputs.past_key, 2), b.constant([0]))
    applies = b.op("Or", b.op("Or", one_sequence, one_token), no_past)
    if not masked:
        slot = b.op("Range", b.constant(0), b.op("Squeeze", total), b.constant(1))
        place = b.op("Mod", held, b.constant(spec.chunk_size)) if spec.chunk_size else held
        in_order = b.op("Or", b.op("Equal", place, slot), b.op("Less", held, b.constant(0)))
        applies = b.op("And", applies, _all(b, in_order))
    last = b.op("Expand", b.op("Sub", total, b.constant([1])), b.dim(inputs.query, 0))
    return Call(applies, last, total, held, start, masked=masked)


def appended_kernel(
    b: Builder, spec: AttentionSpec, inputs: Inputs, heads: Heads, call: Call, prepares: bool
) -> Outputs:
    """The kernel on a past that ends where the new tokens begin; what a token may see can be an additive mask."""
    assert call.held is not None  # an appended cache has it
    past_key, past_value = inputs.past_key, inputs.past_value
    if call.start is not None:
        past_key, past_value = (b.slice(x, call.start, None, axis=2) for x in (past_key, past_value))
    seen = inputs._replace(past_key=past_key, past_value=past_value)
    bias = _bias(b, spec, heads.positions, call.held) if call.masked else None
    merged, key, value = group_query_attention(b, spec, heads, seen, call, bias, prepares)
    if call.start is not None:
        # The kernel gives the keys of the window; the cache keeps them all, and its last ones are the kernel's last.
        new = b.op("Neg", b.dim(inputs.query, 1))
        key, value = (
            b.op("Concat", past, b.slice(present, new, None, axis=2), axis=2)
            for past, present in ((inputs.past_key, key), (inputs.past_value, value))
        )
    elif spec.chunk_size:
        keep = kv_cache.next_chunk_start(b, spec.chunk_size, call.held)
        key, value = (b.slice(x, keep, None, axis=2) for x in (key, value))
    return merged, key, value


def static_call(b: Builder, spec: AttentionSpec, inputs: Inputs, provider: Provider) -> Call:
    """Static: as above, and every sequence's new tokens fill slots in a row, inside one chunk and inside the buffer.

    Lengths are positions, in a chunked layer positions mod C.
    """
    new = b.dim(inputs.query, 1)
    past_tokens = b.op("Sub", b.dim(inputs.positions, 1), new)
    length = kv_cache.past_length(b, inputs.positions, past_tokens)
    offset = b.op("Mod", length, b.constant(spec.chunk_size)) if spec.chunk_size else length
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
    longest = b.op("ReduceMax", offset, keepdims=0)
    shape_allows = b.op("Or", b.op("Or", one_sequence, one_token), b.op("Equal", longest, b.constant(0)))
    applies = b.op("And", b.op("And", fits, contiguous), shape_allows)
    last = b.op("Sub", b.op("Squeeze", end, b.constant([1])), b.constant(1))
    call = Call(applies, last, b.op("Add", longest, new))
    if provider.far_tokens is None or spec.chunk_size or spec.kv_dtype != "none":
        return call
    far = b.op("And", b.op("And", one_sequence, one_token), b.op("Greater", longest, b.constant(provider.far_tokens)))
    return call._replace(again=b.op("Cast", far, to=int(ir.DataType.INT64)), past=longest)


def static_kernel(b: Builder, spec: AttentionSpec, inputs: Inputs, heads: Heads, call: Call, prepares: bool) -> Outputs:
    """The kernel on buffers it writes in place."""
    if call.again is None:
        return group_query_attention(b, spec, heads, inputs, call, None, prepares)
    heads = _with_past_again(b, inputs, heads, call)
    merged, key, value = group_query_attention(b, spec, heads, inputs, call, None, prepares)
    return b.slice(merged, b.op("Neg", b.dim(inputs.query, 1)), None, axis=1), key, value


def _with_past_again(b: Builder, inputs: Inputs, heads: Heads, call: Call) -> Heads:
    """Put ``call.again`` tokens of the past, one or none, in front of the new ones.

    Their keys and values are written to where they are; their query does not matter, and what comes of it is dropped.
    """
    assert call.again is not None
    assert call.past is not None
    begin = b.op("Sub", call.past, call.again)
    end = b.op("Unsqueeze", call.past, b.constant([0]))
    key, value = (
        b.op("Transpose", b.slice(past, begin, end, axis=2), perm=[0, 2, 1, 3])
        for past in (inputs.past_key, inputs.past_value)
    )
    query = b.slice(heads.query, b.constant([0]), call.again, axis=1)
    return heads._replace(
        query=b.op("Concat", query, heads.query, axis=1),
        key=b.op("Concat", key, heads.key, axis=1),
        value=b.op("Concat", value, heads.value, axis=1),
    )


def _bias(b: Builder, spec: AttentionSpec, query_positions: ir.Value, held: ir.Value) -> ir.Value:
    """What is added to the scores, [B,1,S,K]: 0 or the lowest number."""
    dtype = COMPUTE_TYPES[spec.compute]
    visible = definition.visibility(b, spec, query_positions, held)
    lowest = b.constant(dtype.min, dtype.numpy())
    return b.op("Unsqueeze", b.op("Where", visible, b.constant(0, dtype.numpy()), lowest), b.constant([1]))


def _all(b: Builder, condition: ir.Value) -> ir.Value:
    """Whether every element of a bool tensor holds: bool [1]."""
    as_int = b.op("Cast", condition, to=int(ir.DataType.INT64))
    return b.op("Equal", b.op("ReduceMin", b.reshape(as_int, [-1]), keepdims=1), b.constant([1]))
