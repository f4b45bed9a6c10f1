"""Triton kernels for several new tokens a sequence: make them ready, attend, write the cache (see kernels.py)."""

import triton
import triton.language as tl

from l4convert.plugins.long_context_attention.elements import FP8, NONE, encode, operand_of, query_operand
from l4convert.plugins.long_context_attention.heads import rope_and_norm, temperature

# The start of a running maximum where some keys of a tile are masked: finite, so that differences are numbers.
# What a row gathers before its first visible key is wiped out by that key, whose weight is 2^1e29 times as large.
# A power of two, so that its product with SCALE is exact: the compiler fuses that product with the difference to the
# maximum, and what rounding left would be 1e21 in an exponent.
LOWEST = tl.constexpr(-(2.0**100))
# float16 weights are kept below 2^15, not below 1: else those under 6e-8 vanish, and ten million of them count.
WEIGHT_BITS = tl.constexpr(15.0)


@triton.jit
def prepare(
    query,  # [B, S, Hk * G * D]
    key,  # [B, S, Hk * D]
    value,
    positions,  # int64 [B, T]
    cos,  # [table_rows, D/2]
    sin,
    key_scale,  # [Hk, D]
    value_scale,
    ready,  # as query: the queries as the matrix units take them
    new_key,  # [B, Hk, S, D], as the cache stores them
    new_value,
    sequences,  # int64 [B, 4]: column of the first real new token, how many, position of the first, 0
    new_tokens,  # S
    seen_tokens,  # T
    chunk,  # C
    table_rows,
    heads,  # Hk
    group,  # G
    rope,  # 0 or 1
    qk_norm_eps,  # 0: none
    floor_scale,
    attn_scale,  # 0: none
    D: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    KV: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
):
    """Program (i, y, b): the i-th BT new tokens of key/value head y, or of query head y - Hk where there is none.

    The first program of a sequence also says where its tokens are.
    """
    y = tl.program_id(1)
    batch = tl.program_id(2)
    positions += (batch + 1).to(tl.int64) * seen_tokens - new_tokens
    first = tl.program_id(0) * BT
    lane = tl.arange(0, BT)
    column = tl.arange(0, D)
    there = first + lane < new_tokens
    position = tl.maximum(tl.load(positions + first + lane, there, 0), 0)
    slot = (position % chunk).to(tl.int32)
    token0 = batch.to(tl.int64) * new_tokens + first
    if y < heads:
        if (tl.program_id(0) == 0) & (y == 0):
            _find_sequence(positions, sequences + batch * 4, new_tokens, BS)
        source = token0 * heads * D + (lane * heads + y)[:, None] * D + column[None, :]
        k = tl.load(key + source, there[:, None], 0.0)
        k = rope_and_norm(k.to(tl.float32), cos, sin, slot, rope, table_rows, qk_norm_eps, BT, D).to(k.dtype)
        v = tl.load(value + source, there[:, None], 0.0)
        if KV != NONE:
            of_head = y * D + column[None, :]
            k = encode(k.to(tl.float32), tl.load(key_scale + of_head), KV)
            v = encode(v.to(tl.float32), tl.load(value_scale + of_head), KV)
        to = ((batch * heads + y).to(tl.int64) * new_tokens + first) * D + lane[:, None] * D + column[None, :]
        tl.store(new_key + to, k, there[:, None])
        tl.store(new_value + to, v, there[:, None])
    else:
        head = y - heads
        at = token0 * heads * group * D + (lane * heads * group + head)[:, None] * D + column[None, :]
        q = tl.load(query + at, there[:, None], 0.0)
        dtype: tl.constexpr = q.dtype
        unit: tl.constexpr = 256.0 if (KV == FP8 and not HARDWARE_FP8) else 1.0
        q = rope_and_norm(q.to(tl.float32), cos, sin, slot, rope, table_rows, qk_norm_eps, BT, D)
        if attn_scale > 0:
            q *= temperature(position, floor_scale, attn_scale)[:, None]
        q = query_operand(q.to(dtype).to(tl.float32), key_scale, head // group, dtype, KV, unit, D)
        tl.store(ready + at, q, there[:, None])


@triton.jit
def _find_sequence(positions, sequence, new_tokens, BS: tl.constexpr):
    """Where the real new tokens are: consecutive columns with consecutive positions, padding (-1) around them."""
    begin = tl.full([1], 0, tl.int32) + new_tokens
    count = tl.zeros([1], tl.int32)
    for start in tl.range(0, new_tokens, BS):
        at = start + tl.arange(0, BS)
        real = tl.load(positions + at, at < new_tokens, -1) >= 0
        begin = tl.minimum(begin, tl.min(tl.where(real, at, new_tokens), 0))
        count += tl.sum(real.to(tl.int32), 0)
    position = tl.load(positions + begin, begin < new_tokens, 0)
    lane = tl.arange(0, 4)
    facts = tl.where(lane == 0, begin.to(tl.int64), tl.where(lane == 1, count.to(tl.int64), 0))
    tl.store(sequence + lane, tl.where(lane == 2, position, facts))


@triton.jit
def prefill(
    ready,  # [B, S, Hk * G * D], from prepare
    cache_key,  # [B, Hk, M, D]
    cache_value,
    new_key,  # [B, Hk, S, D], from prepare
    new_value,
    sequences,  # int64 [B, 4], from prepare
    value_scale,
    attention,  # as ready, and in the same place: written if splits == 1
    partial,  # as in decode, written otherwise; rows as those of attention
    partial_max,
    partial_sum,
    new_tokens,  # S
    capacity,
    chunk,
    group,
    splits,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SCALE: tl.constexpr,
    KV: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    MASK_ALL: tl.constexpr,  # Triton spreads the rows of mma.sync's tiles over warps where this is a branch
):
    """Program (tile and split, h, b): BM of the S*G queries of key/value head h, token after token, G heads each.

    So one tile of keys serves the G heads, a tile of queries spans few tokens (little is wasted at the diagonal), and
    short calls still fill it. Tiles of keys that all queries see come first, without a mask; then those at an edge.
    Others are not touched. New tokens are counted from the sequence's first real one: token i has position p0 + i.
    """
    split = tl.program_id(0) % splits
    # The last tiles see most keys; they start first.
    number = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch = tl.program_id(2)
    operand: tl.constexpr = ready.dtype.element_ty
    bits: tl.constexpr = WEIGHT_BITS if operand == tl.float16 else 0.0
    unit: tl.constexpr = 256.0 if (KV == FP8 and not HARDWARE_FP8) else 1.0

    begin = tl.load(sequences + batch * 4).to(tl.int32)
    count = tl.load(sequences + batch * 4 + 1).to(tl.int32)
    position = tl.load(sequences + batch * 4 + 2)
    offset = (position % chunk).to(tl.int32)  # tokens before the first new one in its chunk: the past it sees
    size = chunk.to(tl.int32)

    # The tile's rows; `index` counts real new tokens, and rows of padding borrow one from their neighbours.
    token0 = number * BM // group
    flat = number * BM + tl.arange(0, BM)
    token = flat // group
    there = token < new_tokens
    low = tl.maximum(token0 - begin, 0)
    high = tl.minimum(tl.minimum((number * BM + BM - 1) // group, new_tokens - 1) - begin, count - 1)
    some = low <= high
    real = there & (token >= begin) & (token < begin + count)
    index = tl.minimum(tl.maximum(token - begin, low), tl.maximum(high, 0))
    column = tl.arange(0, D)
    line0 = (batch.to(tl.int64) * new_tokens + token0) * heads * group  # of [B * S * Hq] rows
    line = (token - token0) * heads * group + head * group + flat % group

    q = tl.load(ready + line0 * D + line[:, None] * D + column[None, :], there[:, None], 0.0)

    # What a row sees: of the cache slots [0, row_past), of the new tokens [row_from, row_end).
    segment = (offset + index) // size
    row_past = tl.where(segment == 0, offset, 0)
    row_from = tl.maximum(segment * size - offset, 0)
    row_end = index + 1
    low_segment = (offset + low) // size
    edges_only = low_segment != (offset + tl.maximum(high, 0)) // size  # a chunk ends within the tile
    past_end = tl.where(some & (low_segment == 0), tl.minimum(offset.to(tl.int64), capacity).to(tl.int32), 0)
    new_from = tl.maximum(low_segment * size - offset, 0)
    new_end = tl.where(some, high + 1, new_from)
    past_tiles = tl.cdiv(past_end, BN)
    tiles = past_tiles + tl.cdiv(new_end - new_from, BN)

    kv_row = (batch * heads + head).to(tl.int64)
    past_key = cache_key + kv_row * capacity * D
    past_value = cache_value + kv_row * capacity * D
    new_key += (kv_row * new_tokens + begin) * D
    new_value += (kv_row * new_tokens + begin) * D
    lane_n = tl.arange(0, BN)
    tile = lane_n[:, None] * D + column[None, :]
    highest = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    each = tl.cdiv(tiles, splits)
    for t in tl.range(split * each, tl.minimum((split + 1) * each, tiles)):
        is_past = t < past_tiles
        start = tl.where(is_past, t * BN, new_from + (t - past_tiles) * BN)
        at = start.to(tl.int64) * D
        index_n = start + lane_n
        held = (index_n < tl.where(is_past, past_end, new_end))[:, None]
        k = tl.load(tl.where(is_past, past_key, new_key) + at + tile, held, 0)
        scores = tl.dot(q, tl.trans(operand_of(k, KV, HARDWARE_FP8)))
        if MASK_ALL | edges_only | (start + BN > tl.where(is_past, past_end, low + 1)):
            lowest = tl.where(is_past, 0, row_from)
            beyond = tl.where(is_past, row_past, row_end)
            seen = (index_n[None, :] >= lowest[:, None]) & (index_n[None, :] < beyond[:, None])
            scores = tl.where(seen, scores, LOWEST)
        risen = tl.maximum(highest, tl.max(scores, 1) * SCALE)
        keep = tl.exp2(highest - risen)
        weights = tl.exp2(scores * SCALE - (risen - bits)[:, None])
        total = total * keep + tl.sum(weights, 1)
        v = tl.load(tl.where(is_past, past_value, new_value) + at + tile, held, 0)
        acc = tl.dot(weights.to(operand), operand_of(v, KV, HARDWARE_FP8), acc * keep[:, None])
        highest = risen

    if splits == 1:
        if KV != NONE:
            acc *= (tl.load(value_scale + head * D + column) * unit)[None, :]
        seen_any = real & (total > 0)
        result = tl.where(seen_any[:, None], acc / tl.where(seen_any, total, 1.0)[:, None], 0.0)
        tl.store(
            attention + line0 * D + line[:, None] * D + column[None, :],
            result.to(attention.dtype.element_ty),
            there[:, None],
        )
    else:
        out = (line0 + line) * splits + split
        filled = real & (total > 0)
        tl.store(partial_max + out, tl.where(filled, highest, float("-inf")), there)
        tl.store(partial_sum + out, total, there)
        tl.store(partial + out[:, None] * D + column[None, :], acc * unit, filled[:, None])


@triton.jit
def commit(
    new_key,  # [B, Hk, S, D], from prepare
    new_value,
    sequences,  # int64 [B, 4], from prepare
    cache_key,  # [B, Hk, M, D]
    cache_value,
    new_tokens,  # S
    capacity,
    chunk,
    D: tl.constexpr,
    BT: tl.constexpr,
):
    """Program (i, h, b): write the i-th BT new tokens to their slots, but for padding and chunks that are over."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    begin = tl.load(sequences + batch * 4).to(tl.int32)
    count = tl.load(sequences + batch * 4 + 1).to(tl.int32)
    offset = (tl.load(sequences + batch * 4 + 2) % chunk).to(tl.int32)
    size = chunk.to(tl.int32)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    index = token - begin
    kept = (index >= 0) & (index < count) & ((offset + index) // size == (offset + count - 1) // size)
    slot = ((offset + index) % size).to(tl.int64)
    kept = (kept & (slot < capacity))[:, None]
    row = (batch * tl.num_programs(1) + head).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    source = (row * new_tokens + token)[:, None] * D + column
    to = (row * capacity + slot)[:, None] * D + column
    tl.store(cache_key + to, tl.load(new_key + source, kept, 0), kept)
    tl.store(cache_value + to, tl.load(new_value + source, kept, 0), kept)
