"""Triton kernels of ``l4convert::LongContextAttention`` with static caches (the plugin; definition.py says what is computed).

One new token a sequence (decode): ``decode`` splits the keys of a sequence among programs, ``combine`` merges them.
Several (prefill): ``prepare`` makes the new keys and values ready, ``prefill`` attends, ``commit`` writes the cache.

Names: B sequences, S new tokens, T columns of ``positions``, Hk key/value heads, G query heads to each, D = head_dim,
M = ``capacity`` slots of a cache, C = ``chunk`` (a global layer: the largest int32, so that everything is one chunk).
A position in its chunk, ``p mod C``, is a slot of the cache and a row of the rotary tables, in either kind of layer.
Slots are int32, offsets of tiles into buffers int64.

``KV`` says what a cache's element is: 0 a number of the compute type, 1 an E4M3 byte, 2 an int8 (both as *u8). The scales
of a quantized cache are taken out of the loops: a key's goes into the query, a value's into the result. What is
multiplied then are the codes, in float16, which holds them exactly.

Softmax is online (arXiv:1805.02867), in base 2 and float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
# The start of a running maximum where some keys of a tile are masked: finite, so that differences are numbers.
# What a row gathers before its first visible key is wiped out by that key, whose weight is 2^1e30 times as large.
LOWEST = tl.constexpr(-1e30)
# float16 weights are kept below 2^15, not below 1: else those under 6e-8 vanish, and ten million of them count.
WEIGHT_BITS = tl.constexpr(15.0)
# Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, ties to even.
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def _rotate(x, cos, sin, R: tl.constexpr, D: tl.constexpr):
    """Turn adjacent pairs of float32 [R, D] by the angles whose cosines and sines are [R, D/2] (or [1, D/2])."""
    even, odd = tl.split(tl.reshape(x, [R, D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [R, D])


@triton.jit
def _normalize(x, epsilon, D: tl.constexpr):
    """RMS norm without weights of each row of float32 [R, D]."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]


@triton.jit
def _rope_and_norm(x, cos, sin, slot, rope, table_rows, epsilon, R: tl.constexpr, D: tl.constexpr):
    """Float32 [R, D] rotated (if ``rope``) by the table's rows ``slot`` [R or 1], then normed (if ``epsilon``)."""
    if rope != 0:
        pair = tl.arange(0, D // 2)
        # A row that the table lacks would be a wrong call; it must not become a wild read.
        at = tl.minimum(slot, table_rows - 1).to(tl.int64)[:, None] * (D // 2) + pair[None, :]
        x = _rotate(x, tl.load(cos + at), tl.load(sin + at), R, D)
    if epsilon > 0:
        x = _normalize(x, epsilon, D)
    return x


@triton.jit
def _temperature(position, floor_scale, attn_scale):
    """1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), the quotient in float32 as the definition has it."""
    steps = tl.floor(tl.div_rn((position + 1).to(tl.float32), floor_scale))
    return 1.0 + attn_scale * tl.log(1.0 + steps)


@triton.jit
def _e4m3_byte(x):
    """The byte of the E4M3 number nearest to float32 x, ties to even, saturated at 448; NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponent biases: 127 - 7 = 120; 3 mantissa bits
    # Below 2^-6 numbers are 2^-9 apart, which is what the sum's last mantissa bit stands for.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(size < 0.015625, subnormal, normal)
    byte = tl.where(x != x, 0x7F, byte)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (byte | sign).to(tl.uint8)


@triton.jit
def _encode(x, scale, KV: tl.constexpr):
    """Bytes of float32 x in a quantized cache (quantized.py); the reciprocal is rounded first, as there."""
    quotient = x * tl.div_rn(1.0, scale)
    if KV == FP8:
        return _e4m3_byte(quotient)
    clipped = tl.minimum(tl.maximum(quotient, -128.0), 127.0)
    return ((clipped + ROUND_TO_INTEGER) - ROUND_TO_INTEGER).to(tl.int32).to(tl.uint8)


@triton.jit
def _decode_bytes(code, KV: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """The numbers of a quantized cache's bytes, exact in float16; without HARDWARE_FP8 E4M3 numbers come out 2^-8 fold.

    E4M3 and float16 have their fields in one order, so a shift turns one into the other but for the exponent's bias
    (7 and 15). An int8 plus 128, put into the mantissa of 1024.0, is 1152 too large.
    """
    if KV == INT8:
        bits = (code ^ 0x80).to(tl.uint16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - 1152.0
    if HARDWARE_FP8:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _operand(tile, KV: tl.constexpr, HARDWARE_FP8: tl.constexpr):
    """A tile of a cache as the matrix units take it."""
    return tile if KV == NONE else _decode_bytes(tile, KV, HARDWARE_FP8)


@triton.jit
def _query_operand(query, key_scale, head, dtype: tl.constexpr, KV: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr):
    """Float32 queries, already of values of the compute type ``dtype``, as the matrix units take them.

    ``UNIT``: what a code's number has to be multiplied by (:func:`_decode_bytes`).
    """
    if KV == NONE:
        return query.to(dtype)
    else:  # without it, Triton wants both results to be of one type
        scale = tl.load(key_scale + head * D + tl.arange(0, D))
        scaled = query * (scale * UNIT)[None, :]
        return tl.minimum(tl.maximum(scaled, -FLOAT16_MAX), FLOAT16_MAX).to(tl.float16)


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
    q = _rope_and_norm(q.to(tl.float32), cos, sin, row, rope, table_rows, qk_norm_eps, R, D)
    if attn_scale > 0:
        q *= _temperature(position, floor_scale, attn_scale)
    q = _query_operand(q.to(dtype).to(tl.float32), key_scale, head, dtype, KV, unit, D)

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
        k = _rope_and_norm(
            tl.load(key + at).to(tl.float32)[None, :], cos, sin, row, rope, table_rows, qk_norm_eps, 1, D
        )
        k = k.to(dtype)
        v = tl.load(value + at)[None, :]
        if KV != NONE:
            of_head = head * D + column[None, :]
            k = _encode(k.to(tl.float32), tl.load(key_scale + of_head), KV)
            v = _encode(v.to(tl.float32), tl.load(value_scale + of_head), KV)
        to = base + slot.to(tl.int64) * D + column[None, :]
        tl.store(cache_key + to, k)
        tl.store(cache_value + to, v)
        k_number = _operand(k, KV, HARDWARE_FP8).to(tl.float32)
        v_number = _operand(v, KV, HARDWARE_FP8).to(tl.float32)
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
        scores = tl.dot(q, tl.trans(_operand(k, KV, HARDWARE_FP8))) * SCALE
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
            acc = tl.dot(weights.to(operand), _decode_bytes((pairs & 0xFF).to(tl.uint8), KV, HARDWARE_FP8), acc)
            odd = tl.dot(
                weights.to(operand), _decode_bytes((pairs >> 8).to(tl.uint8), KV, HARDWARE_FP8), odd * keep[:, None]
            )
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


@triton.jit
def prepare(
    key,  # [B, S, Hk * D]
    value,
    positions,  # int64 [B, T]
    cos,
    sin,
    key_scale,
    value_scale,
    new_key,  # [B, Hk, S, D], as the cache stores them
    new_value,
    sequences,  # int64 [B, 4]: column of the first real new token, how many, position of the first, 0
    new_tokens,  # S
    seen_tokens,  # T
    chunk,
    table_rows,
    rope,
    qk_norm_eps,
    D: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
    KV: tl.constexpr,
):
    """Program (i, h, b): the i-th BT new tokens of a key/value head; the first of a sequence also says where it is."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    batch = tl.program_id(2)
    positions += (batch + 1).to(tl.int64) * seen_tokens - new_tokens
    if (tl.program_id(0) == 0) & (head == 0):
        _find_sequence(positions, sequences + batch * 4, new_tokens, BS)
    first = tl.program_id(0) * BT
    lane = tl.arange(0, BT)
    column = tl.arange(0, D)
    there = first + lane < new_tokens
    source = (batch.to(tl.int64) * new_tokens + first) * heads * D
    source += (lane * heads + head)[:, None] * D + column[None, :]
    position = tl.load(positions + first + lane, there, 0)
    slot = (tl.maximum(position, 0) % chunk).to(tl.int32)
    k = tl.load(key + source, there[:, None], 0.0)
    k = _rope_and_norm(k.to(tl.float32), cos, sin, slot, rope, table_rows, qk_norm_eps, BT, D).to(k.dtype)
    v = tl.load(value + source, there[:, None], 0.0)
    if KV != NONE:
        of_head = head * D + column[None, :]
        k = _encode(k.to(tl.float32), tl.load(key_scale + of_head), KV)
        v = _encode(v.to(tl.float32), tl.load(value_scale + of_head), KV)
    to = ((batch * heads + head).to(tl.int64) * new_tokens + first) * D + lane[:, None] * D + column[None, :]
    tl.store(new_key + to, k, there[:, None])
    tl.store(new_value + to, v, there[:, None])


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
    query,  # [B, S, Hk * G * D]
    cache_key,  # [B, Hk, M, D]
    cache_value,
    new_key,  # [B, Hk, S, D], from prepare
    new_value,
    sequences,  # int64 [B, 4], from prepare
    cos,
    sin,
    key_scale,
    value_scale,
    attention,  # [B, S, Hk * G * D], written if splits == 1
    partial,  # as in decode, written otherwise; rows as those of attention
    partial_max,
    partial_sum,
    new_tokens,  # S
    capacity,
    chunk,
    table_rows,
    group,
    splits,
    rope,
    qk_norm_eps,
    floor_scale,
    attn_scale,
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
    dtype: tl.constexpr = query.dtype.element_ty
    operand: tl.constexpr = dtype if KV == NONE else tl.float16
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

    q = tl.load(query + line0 * D + line[:, None] * D + column[None, :], there[:, None], 0.0).to(tl.float32)
    q = _rope_and_norm(q, cos, sin, (offset + index) % size, rope, table_rows, qk_norm_eps, BM, D)
    if attn_scale > 0:
        q *= _temperature(position + index, floor_scale, attn_scale)[:, None]
    q = _query_operand(q.to(dtype).to(tl.float32), key_scale, head, dtype, KV, unit, D)
    ready = attention.to(tl.pointer_type(operand)) + line0 * D + line[:, None] * D + column[None, :]
    tl.store(ready, q, there[:, None])
    tl.debug_barrier()
    q = tl.load(ready, there[:, None], 0.0)

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
        scores = tl.dot(q, tl.trans(_operand(k, KV, HARDWARE_FP8)))
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
        acc = tl.dot(weights.to(operand), _operand(v, KV, HARDWARE_FP8), acc * keep[:, None])
        highest = risen

    if splits == 1:
        if KV != NONE:
            acc *= (tl.load(value_scale + head * D + column) * unit)[None, :]
        seen_any = real & (total > 0)
        result = tl.where(seen_any[:, None], acc / tl.where(seen_any, total, 1.0)[:, None], 0.0)
        tl.store(attention + line0 * D + line[:, None] * D + column[None, :], result.to(dtype), there[:, None])
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
