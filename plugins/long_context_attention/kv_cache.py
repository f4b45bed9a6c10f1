"""The three forms of the KV cache as plain ONNX (DESIGN section 5): what a layer attends to, and what it hands on.

growing   past and present hold every slot of the attention mask; chunked layers slice what they need.
windowed  chunked layers keep only the slots of the chunk that the next token falls in.
static    fixed buffers, written in place: slot = position, in chunked layers position mod C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from l4convert.frontend.builder import INT64_MAX, Builder


class Step(NamedTuple):
    """One call: new key and value [B,Hk,S,D] and their positions [B,S]; the past, and the positions [B,T] of all."""

    key: ir.Value
    value: ir.Value
    new_positions: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    positions: ir.Value


class Cache(NamedTuple):
    """key, value [B,Hk,K,D] and positions [B,K] to attend to; present_key, present_value to hand on."""

    key: ir.Value
    value: ir.Value
    positions: ir.Value
    present_key: ir.Value
    present_value: ir.Value


CacheForm = Callable[[Builder, int, Step], Cache]


def growing(b: Builder, chunk_size: int, step: Step) -> Cache:
    """Append to the past; a chunked layer attends from the first slot that any new token can see."""
    present_key = b.op("Concat", step.past_key, step.key, axis=2)
    present_value = b.op("Concat", step.past_value, step.value, axis=2)
    if not chunk_size:
        return Cache(present_key, present_value, step.positions, present_key, present_value)
    start = window_start(b, chunk_size, step.positions, step.new_positions)
    return Cache(
        b.slice(present_key, start, None, axis=2),
        b.slice(present_value, start, None, axis=2),
        b.slice(step.positions, start, None, axis=1),
        present_key,
        present_value,
    )


def windowed(b: Builder, chunk_size: int, step: Step) -> Cache:
    """As growing, but a chunked layer's past and present are the last slots only: those the next token can see."""
    if not chunk_size:
        return growing(b, chunk_size, step)
    all_key = b.op("Concat", step.past_key, step.key, axis=2)
    all_value = b.op("Concat", step.past_value, step.value, axis=2)
    slots = b.op("Neg", b.dim(all_key, 2))
    held = b.slice(step.positions, slots, None, axis=1)
    keep = next_chunk_start(b, chunk_size, held)
    return Cache(all_key, all_value, held, b.slice(all_key, keep, None, axis=2), b.slice(all_value, keep, None, axis=2))


def static(b: Builder, chunk_size: int, step: Step) -> Cache:
    """Attend to the written slots and the new tokens, then write the new tokens to their slots.

    The values to write are gathered from the concatenation that attention reads, not from the new tokens themselves:
    past and present may be one buffer, and this makes every read of it come before the write.
    """
    new_tokens = b.dim(step.key, 2)
    past_tokens = b.op("Sub", b.dim(step.positions, 1), new_tokens)
    capacity = b.dim(step.past_key, 2)
    reach = b.op("Min", capacity, b.constant([chunk_size])) if chunk_size else capacity
    slots = b.op("Min", past_tokens, reach)
    all_key = b.op("Concat", b.slice(step.past_key, b.constant([0]), slots, axis=2), step.key, axis=2)
    all_value = b.op("Concat", b.slice(step.past_value, b.constant([0]), slots, axis=2), step.value, axis=2)
    length = past_length(b, step.positions, past_tokens)
    held = b.op("Concat", slot_positions(b, chunk_size, slots, length), step.new_positions, axis=1)
    index = write_index(b, chunk_size, slots, step.new_positions)
    return Cache(
        all_key,
        all_value,
        held,
        write(b, step.past_key, all_key, index),
        write(b, step.past_value, all_value, index),
    )


FORMS: dict[str, CacheForm] = {"growing": growing, "windowed": windowed, "static": static}


def window_start(b: Builder, chunk_size: int, positions: ir.Value, new_positions: ir.Value) -> ir.Value:
    """First slot (int64 [1]) that a new token of any sequence can see; never after the first new slot."""
    unseen = b.constant(INT64_MAX)  # rows that are all padding see nothing
    real = b.op("GreaterOrEqual", new_positions, b.constant(0))
    first = b.op("ReduceMin", b.op("Where", real, new_positions, unseen), b.constant([1]), keepdims=1)
    size = b.constant(chunk_size)
    chunk_start = b.op("Mul", b.op("Div", first, size), size)
    first_new = b.op("Sub", b.dim(positions, 1), b.dim(new_positions, 1))
    return first_slot(b, b.op("GreaterOrEqual", positions, chunk_start), first_new)


def next_chunk_start(b: Builder, chunk_size: int, positions: ir.Value) -> ir.Value:
    """First slot (int64 [1]) that the next token of any sequence will see; the number of slots where there is none."""
    following = b.op(
        "Add", b.op("ReduceMax", positions, b.constant([1]), keepdims=1), b.constant(1)
    )  # 0 for a row of padding, whose next token starts chunk 0
    size = b.constant(chunk_size)
    chunk_start = b.op("Mul", b.op("Div", following, size), size)
    return first_slot(b, b.op("GreaterOrEqual", positions, chunk_start), b.dim(positions, 1))


def first_slot(b: Builder, needed: ir.Value, otherwise: ir.Value) -> ir.Value:
    """First slot that is needed in any row of bool [B,T], at most ``otherwise`` (int64 [1])."""
    slot = b.op("Range", b.constant(0), b.op("Squeeze", b.dim(needed, 1)), b.constant(1))
    candidates = b.op("Where", needed, slot, otherwise)
    return b.op("ReduceMin", b.op("Concat", b.reshape(candidates, [-1]), otherwise, axis=0), keepdims=1)


def past_length(b: Builder, positions: ir.Value, past_tokens: ir.Value) -> ir.Value:
    """How many real tokens each sequence has in the cache, int64 [B,1]: all up to its last but the new ones.

    To count the past itself would be several passes over every column in every call; this is one.
    """
    total = b.op("Add", b.op("ReduceMax", positions, b.constant([1]), keepdims=1), b.constant(1))
    new = b.slice(positions, past_tokens, None, axis=1)
    real = b.op("Cast", b.op("GreaterOrEqual", new, b.constant(0)), to=int(ir.DataType.INT64))
    return b.op("Sub", total, b.op("ReduceSum", real, b.constant([1]), keepdims=1))


def slot_positions(b: Builder, chunk_size: int, slots: ir.Value, length: ir.Value) -> ir.Value:
    """Position that each slot of a static buffer holds, int64 [B,slots]; below -1 where nothing of use is written."""
    slot = b.op("Unsqueeze", b.op("Range", b.constant(0), b.op("Squeeze", slots), b.constant(1)), b.constant([0]))
    if chunk_size:
        size = b.constant(chunk_size)
        base = b.op("Mul", b.op("Div", length, size), size)  # a full chunk is of no use to the next token
        slot = b.op("Add", slot, base)
    unwritten = b.constant(-2 * max(chunk_size, 1))
    return b.op("Where", b.op("Less", slot, length), slot, unwritten)


class WriteIndex(NamedTuple):
    """For each new token: ``source`` [B,1,S] in the attended keys and ``slot`` [B,1,S] in the buffer."""

    source: ir.Value
    slot: ir.Value


def write_index(b: Builder, chunk_size: int, slots: ir.Value, new_positions: ir.Value) -> WriteIndex:
    """Where each new token goes.

    Padding, and tokens of a chunk that is over when the call ends, are not kept: in their place the sequence's last
    token is written once more (the same value to the same slot, so order does not matter). A sequence without a new
    token writes its first slot back to itself.
    """
    last = b.op("ReduceMax", new_positions, b.constant([1]), keepdims=1)
    if chunk_size:
        size = b.constant(chunk_size)
        begin = b.op("Mul", b.op("Div", b.op("Max", last, b.constant(0)), size), size)
    else:
        begin = b.constant(0)
    keep = b.op("GreaterOrEqual", new_positions, begin)
    new_tokens = b.op("Squeeze", b.dim(new_positions, 1))
    order = b.op("Range", b.constant(0), new_tokens, b.constant(1))
    newest = b.op("ArgMax", new_positions, axis=1, keepdims=1)
    some = b.op("GreaterOrEqual", last, b.constant(0))
    source = b.op("Add", b.op("Where", keep, order, newest), slots)
    source = b.op("Where", some, source, b.constant(0))
    position = b.op("Max", b.op("Where", keep, new_positions, last), b.constant(0))
    slot = b.op("Mod", position, b.constant(chunk_size)) if chunk_size else position
    return WriteIndex(b.op("Unsqueeze", source, b.constant([1])), b.op("Unsqueeze", slot, b.constant([1])))


def write(b: Builder, buffer: ir.Value, held: ir.Value, index: WriteIndex) -> ir.Value:
    """``buffer[b, h, slot[b, s]] = held[b, h, source[b, s]]`` for every head h; buffer [B,Hk,M,D]."""
    heads = b.op(
        "Unsqueeze", b.op("Range", b.constant(0), b.op("Squeeze", b.dim(buffer, 1)), b.constant(1)), b.constant([0, 2])
    )
    batch = b.op("Range", b.constant(0), b.op("Squeeze", b.dim(buffer, 0)), b.constant(1))
    batch = b.op("Unsqueeze", batch, b.constant([1, 2]))

    def coordinates(axis2: ir.Value) -> ir.Value:
        zero = b.op("Mul", b.op("Add", b.op("Add", batch, heads), axis2), b.constant(0))
        parts = [b.op("Unsqueeze", b.op("Add", zero, part), b.constant([3])) for part in (batch, heads, axis2)]
        return b.op("Concat", *parts, axis=3)

    updates = b.op("GatherND", held, coordinates(index.source))
    return b.op("ScatterND", buffer, coordinates(index.slot), updates)
