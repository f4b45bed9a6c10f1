"""Triton kernels of ``l4convert::LongContextAttention`` with static caches (definition.py says what is computed).

One new token a sequence (decode): ``decode`` splits the keys of a sequence among programs, ``combine`` merges them.
Several (prefill.py): ``prepare`` makes the new keys and values ready, ``prefill`` attends, ``commit`` writes the cache.

Names: B sequences, S new tokens, T columns of ``positions``, Hk key/value heads, G query heads to each, D = head_dim,
M = ``capacity`` slots of a cache, C = ``chunk`` (a global layer: the largest int32, so that everything is one chunk).
A position in its chunk, ``p mod C``, is a slot of the cache and a row of the rotary tables, in either kind of layer.
Slots are int32, offsets of tiles into buffers int64.

Softmax is online (arXiv:1805.02867), in base 2 and float32.
"""

import triton
import triton.language as tl

from l4convert.plugins.long_context_attention.elements import FP8, NONE, encode, numbers, operand_of, query_operand
from l4convert.plugins.long_context_attention.heads import rope_and_norm, temperature
from l4convert.plugins.long_context_attention.prefill import LOWEST, WEIGHT_BITS, commit, prefill, prepare

__all__ = ["combine", "commit", "decode", "prefill", "prepare"]


@triton.jit
def decode(
    query,  # [B, Hk * G * D]
    key,  # [B, Hk * D]
    value,
    cache_key,  # [B, Hk, M, D]: read, and the new token's slot written
    cache_value,
    positions,  # int64 [B, T]
    cos,  # [table_rows, D/2]
    sin,
    key_scale,  # [Hk, D]
    value_scale,
    partial,  # float32 [B * Hk * G, splits, D]: sums of weighted values
    partial_max,  # float32 [B * Hk * G, splits]; minus infinity: nothing was summed
    partial_sum,  # float32 [B * Hk * G, splits]: sums of weights
    seen_tokens,  # T
    capacity,  # M
    chunk,  # C
    table_rows,
    group,  # G
    rope,  # 0 or 1
    qk_norm_eps,  # 0: none
    floor_scale,
    attn_scale,  # 0: none
    D: tl.constexpr,
    R: tl.constexpr,  # rows of a tile of queries, at least G
    BN: tl.constexpr,
    SCALE: tl.constexpr,  # log2(e) / sqrt(D)
    KV: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Program (z, h, b): the z-th part of the keys of sequence b for the G query heads of key/value head h.

    The program whose part the new token falls in writes it to the cache and takes it as it is; all read only slots
    before it, so none reads what another writes.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    splits = tl.num_programs(0)
    kv_row = batch * tl.num_programs(1) + head
    position = tl.load(positions + (batch + 1).to(tl.int64) * seen_tokens - 1)
    in_chunk = position % chunk
    length = tl.where((position >= 0) & (in_chunk < capacity), in_chunk + 1, 0).to(tl.int32)
    slot = length - 1
    # Each sequence divides its own length, into no parts of fewer than four tiles.
    span = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BN), 4) * BN
    first = split * span
    lane = tl.arange(0, R)
    column = tl.arange(0, D)
    out = (kv_row * group + lane).to(tl.int64) * splits + split
    used = lane < group
    if first >= length:
        tl.store(partial_max + out, tl.full([R], float("-inf"), tl.float32), mask=used)
        tl.store(partial_sum + out, tl.zeros([R], tl.float32), mask=used)
        return

    dtype: tl.constexpr = query.dtype.element_ty
    operand: tl.constexpr = dtype if KV == NONE else tl.float16
    bits: tl.constexpr = WEIGHT_BITS if operand == tl.float16 else 0.0
    unit: tl.constexpr = 256.0 if (KV == FP8 and not HARDWARE_FP8) else 1.0
    row = tl.full([1], 0, tl.int32) + slot
    q = tl.load(query + (kv_row * group + lane).to(tl.int64)[:, None] * D + column[None, :], used[:, None], 0.0)
    q = rope_and_norm(q.to(tl.float32), cos, sin, row, rope, table_rows, qk_norm_eps, R, D)
    if attn_scale > 0:
        q *= temperature(position, floor_scale, attn_scale)
    q = query_operand(q.to(dtype).to(tl.float32), key_scale, head, dtype, KV, unit, D)

    base = kv_row.to(tl.int64) * capacity * D
    highest = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    # Bytes are multiplied as pairs, of even and odd columns: the units that turn a tile of values on its way to the
    # matrix units do so with 16-bit elements only.
    W: tl.constexpr = D if KV == NONE else D // 2
    acc = tl.zeros([R, W], tl.float32)
    odd = tl.zeros([R, W], tl.float32)
    if slot < first + span:
        at = kv_row * D + column
        k = rope_and_norm(tl.load(key + at).to(tl.float32)[None, :], cos, sin, row, rope, table_rows, qk_norm_eps, 1, D)
        k = k.to(dtype)
        v = tl.load(value + at)[None, :]
        if KV != NONE:
            of_head = head * D + column[None, :]
            k = encode(k.to(tl.float32), tl.load(key_scale + of_head), KV)
            v = encode(v.to(tl.float32), tl.load(value_scale + of_head), KV)
        to = base + slot.to(tl.int64) * D + column[None, :]
        tl.store(cache_key + to, k)
        tl.store(cache_value + to, v)
        k_number = operand_of(k, KV, HARDWARE_FP8).to(tl.float32)
        v_number = operand_of(v, KV, HARDWARE_FP8).to(tl.float32)
        highest = tl.sum(q.to(tl.float32) * k_number, 1) * SCALE
        total += 2.0**bits
        v_number *= 2.0**bits
        if KV == NONE:
            acc += v_number
        else:
            even_number, odd_number = tl.split(tl.reshape(v_number, [1, W, 2]))
            acc += even_number
            odd += odd_number

    end = tl.minimum(first + span, slot)
    lane_n = tl.arange(0, BN)
    tile = lane_n[:, None] * D + column[None, :]
    # Weights are summed by column and added up once at the end: no exchange between warps in the loop.
    sums = tl.zeros([R, BN], tl.float32)
    for start in tl.range(first, end, BN):
        there = start + lane_n < end
        at = base + tl.cast(start, tl.int64) * D
        k = tl.load(cache_key + at + tile, there[:, None], 0)
        scores = tl.dot(q, tl.trans(operand_of(k, KV, HARDWARE_FP8))) * SCALE
        scores = tl.where(there[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        keep = tl.exp2(highest - risen)
        weights = tl.exp2(scores - (risen - bits)[:, None])
        sums = sums * keep[:, None] + weights
        total *= keep
        acc *= keep[:, None]
        if KV == NONE:
            v = tl.load(cache_value + at + tile, there[:, None], 0)
            acc = tl.dot(weights.to(operand), v, acc)
        else:
            pair_at = lane_n[:, None] * W + tl.arange(0, W)[None, :]
            pairs = tl.load(cache_value.to(tl.pointer_type(tl.uint16)) + at // 2 + pair_at, there[:, None], 0)
            acc = tl.dot(weights.to(operand), numbers((pairs & 0xFF).to(tl.uint8), KV, HARDWARE_FP8), acc)
            odd = tl.dot(weights.to(operand), numbers((pairs >> 8).to(tl.uint8), KV, HARDWARE_FP8), odd * keep[:, None])
        highest = risen
    total += tl.sum(sums, 1)
    if KV != NONE:
        acc = tl.reshape(tl.join(acc, odd), [R, D])
    tl.store(partial_max + out, highest, mask=used)
    tl.store(partial_sum + out, total, mask=used)
    tl.store(partial + out[:, None] * D + column[None, :], acc * unit, mask=used[:, None])


@triton.jit
def combine(
    partial,  # as decode wrote them, for all rows of ``attention``
    partial_max,
    partial_sum,
    value_scale,  # float32 [Hk, D]
    attention,  # [rows, D]; row = (b * S + s) * Hq + query head
    splits,
    num_heads,  # Hq
    group,  # G
    quantized,  # 0 or 1: whether there are scales
    D: tl.constexpr,
    BS: tl.constexpr,  # parts of one step
):
    """Program r: merge the parts of row r; a row without any (padding) becomes zeros."""
    row = tl.program_id(0)
    column = tl.arange(0, D)
    at = row.to(tl.int64) * splits
    highest = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([D], tl.float32)
    for start in tl.range(0, splits, BS):
        part = start + tl.arange(0, BS)
        part_max = tl.load(partial_max + at + part, part < splits, float("-inf"))
        part_sum = tl.load(partial_sum + at + part, part < splits, 0.0)
        filled = part_max > float("-inf")
        values = tl.load(partial + (at + part)[:, None] * D + column[None, :], filled[:, None], 0.0)
        risen = tl.maximum(highest, tl.max(part_max, 0))
        keep = tl.exp2(highest - risen)
        weight = tl.exp2(part_max - risen)
        total = total * keep + tl.sum(weight * part_sum, 0)
        acc = acc * keep + tl.sum(weight[:, None] * values, 0)
        highest = risen
    if quantized != 0:
        head = (row % num_heads) // group
        acc *= tl.load(value_scale + head * D + column)
    result = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(attention + row.to(tl.int64) * D + column, result.to(attention.dtype.element_ty))
