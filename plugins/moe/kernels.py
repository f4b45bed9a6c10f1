"""Triton kernels of ``l4convert::MoE``: the routing (routing.py) and the two grouped matrix products.

A product is computed as ``W[N,K] x^T[K,rows]``: weights are the left operand, which tensor cores take from registers,
so that codes are dequantized in registers and never written back. One program computes one tile: some output columns of
one expert for up to TILE of its rows. Small tiles split K over the program's warps (``SPLIT`` slices, summed at the
end), because a few rows give too few tiles to keep a GPU's memory busy otherwise.
"""

import triton
import triton.language as tl

from l4convert.plugins.moe.rounding import fp8_codes, fp8_scale
from l4convert.plugins.moe.routing import moe_choose, moe_place, moe_route, moe_scan

__all__ = ["moe_choose", "moe_place", "moe_product", "moe_quantize", "moe_route", "moe_scan", "moe_sum"]

PLAIN, INT4, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _pairs(words, zero, STEP: tl.constexpr, SHAPE: tl.constexpr, TYPE: tl.constexpr):
    """Codes 16 * STEP .. of each group of 64, 136 or 1032 too large: float32 of shape SHAPE, [.., groups, 16].

    Nibbles STEP and STEP + 4 of a word become two neighbouring 16-bit numbers of one register. The bits 0x4300 + u are
    the bfloat16 number 128 + u, 0x6400 + u the float16 number 1024 + u; u is the code's four bits with the first one
    turned, which is the code + 8.
    """
    MAGIC: tl.constexpr = 0x43084308 if tl.bfloat16 == TYPE else 0x64086408
    pairs = ((words >> (4 * STEP)) & 0x000F000F) ^ (zero + MAGIC)
    low = (pairs & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return tl.join(low, high).reshape(SHAPE).to(tl.float32)


@triton.jit
def _dequantize(
    words, scale, zero, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr
):
    """round(code * scale), TYPE [.., COLUMNS, DEPTH], in the order of K.

    All arithmetic is written in float32 and rounded after each step; the compiler makes one instruction for two codes
    of each: LOP3, HADD2, HMUL2 and, for three steps of four, a shift.

    Args:
        words: int32 [.., COLUMNS, DEPTH / 8]; scale: TYPE [.., COLUMNS, DEPTH / 32].
        zero: An int32 0 that the compiler cannot know: else mask and exclusive or, which each have a constant, are two
            instructions.
    """
    OFFSET: tl.constexpr = 136.0 if tl.bfloat16 == TYPE else 1032.0
    FLAT: tl.constexpr = SPLIT == 1
    STEP: tl.constexpr = (COLUMNS, DEPTH // 64, 16) if FLAT else (SPLIT, COLUMNS, DEPTH // 64, 16)
    SPREAD: tl.constexpr = (COLUMNS, DEPTH // 32, 32) if FLAT else (SPLIT, COLUMNS, DEPTH // 32, 32)
    ALL: tl.constexpr = (COLUMNS, DEPTH) if FLAT else (SPLIT, COLUMNS, DEPTH)
    first = tl.join(_pairs(words, zero, 0, STEP, TYPE), _pairs(words, zero, 1, STEP, TYPE))
    second = tl.join(_pairs(words, zero, 2, STEP, TYPE), _pairs(words, zero, 3, STEP, TYPE))
    code = tl.join(first, second)  # [.., groups, 16, step % 2, step // 2]
    code = (tl.permute(code, (0, 1, 4, 3, 2)) if FLAT else tl.permute(code, (0, 1, 2, 5, 4, 3))).reshape(ALL)
    code = (code - OFFSET).to(TYPE).to(tl.float32)
    scale = tl.broadcast_to(tl.expand_dims(scale, len(ALL)), SPREAD).reshape(ALL).to(tl.float32)
    return (code * scale).to(TYPE)


@triton.jit
def _turned(rows):
    """[.., rows, K] as [.., K, rows]."""
    return tl.trans(rows) if len(rows.shape) == 2 else tl.trans(rows, 0, 2, 1)


@triton.jit
def _lane(size: tl.constexpr, axis: tl.constexpr, RANK: tl.constexpr):
    """0 .. size - 1 along the last axis (axis 1) or the one before (axis 0) of RANK axes."""
    lane = tl.arange(0, size)
    lane = lane[:, None] if axis == 0 else lane[None, :]
    return lane if RANK == 2 else lane[None]


@triton.jit
def _int4_products(
    acc, acc_up, inputs, weight, weight_scale, row, column, count, zero, N, K, columns, block_shift,
    GATED: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = inputs.dtype.element_ty
    RANK: tl.constexpr = 2 if SPLIT == 1 else 3
    lane = _lane(DEPTH, 1, RANK)
    word = _lane(DEPTH // 8, 1, RANK)
    run = 32 * _lane(DEPTH // 32, 1, RANK)
    slice_ = 0 if SPLIT == 1 else tl.arange(0, SPLIT)[:, None, None] * DEPTH
    words = weight + column * (K // 8)
    scales = weight_scale + column
    for begin in range(0, K, SPLIT * DEPTH):
        k = begin + slice_
        rows = _turned(tl.load(inputs + row * K + (k + lane), mask=(row < count) & (k + lane < K), other=0.0))
        inside = (k // 8 + word < K // 8) & (column < columns)
        place = words + (k // 8 + word)
        gate = tl.load(place, mask=inside, other=0)
        scaled = (k + run < K) & (column < columns)
        scale_place = scales + ((k + run) >> block_shift) * N
        scale = tl.load(scale_place, mask=scaled, other=0.0)
        acc = tl.dot(_dequantize(gate, scale, zero, SPLIT, COLUMNS, DEPTH, TYPE), rows, acc)
        if GATED:
            up = tl.load(place + columns * (K // 8), mask=inside, other=0)
            up_scale = tl.load(scale_place + columns, mask=scaled, other=0.0)
            acc_up = tl.dot(_dequantize(up, up_scale, zero, SPLIT, COLUMNS, DEPTH, TYPE), rows, acc_up)
    return acc, acc_up


@triton.jit
def _fp8_products(
    acc, acc_up, inputs, weight, row, column, count, K, columns,
    GATED: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As :func:`_int4_products` for E4M3 codes [N, K]."""
    RANK: tl.constexpr = 2 if SPLIT == 1 else 3
    lane = _lane(DEPTH, 1, RANK)
    slice_ = 0 if SPLIT == 1 else tl.arange(0, SPLIT)[:, None, None] * DEPTH
    for begin in range(0, K, SPLIT * DEPTH):
        k = begin + slice_ + lane
        rows = _turned(tl.load(inputs + row * K + k, mask=(row < count) & (k < K), other=0.0))
        place = weight + column * K + k
        inside = (column < columns) & (k < K)
        acc = tl.dot(tl.load(place, mask=inside, other=0.0), rows, acc)
        if GATED:
            acc_up = tl.dot(tl.load(place + columns * K, mask=inside, other=0.0), rows, acc_up)
    return acc, acc_up


@triton.jit
def _plain_products(
    acc, acc_up, inputs, weight, row, column, count, K, columns, N, GATED: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Sums [rows, columns] of 16-bit weights [K, N]: with nothing to dequantize they are the right operand as they are.

    Args:
        row: [rows, 1]; column: [1, columns].
    """
    for begin in range(0, K, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        rows = tl.load(inputs + row * K + k[None, :], mask=(row < count) & (k < K)[None, :], other=0.0)
        place = weight + k[:, None] * N + column
        inside = (column < columns) & (k < K)[:, None]
        acc = tl.dot(rows, tl.load(place, mask=inside, other=0.0), acc)
        if GATED:
            acc_up = tl.dot(rows, tl.load(place + columns, mask=inside, other=0.0), acc_up)
    return acc, acc_up


@triton.jit
def moe_product(
    tiles, inputs, row_scale, weight, weight_scale, output, targets, slots, K, columns, block_shift, above, up_to,
    WEIGHTS: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of ``silu(gate) * up`` (GATED) or of the second product.

    The grid is flat: slots * ceil(columns / COLUMNS) programs, TOGETHER neighbouring slots for the same columns before
    the next columns, so that an expert's weights are shared in the L2 cache. A program does nothing unless its slot has
    above < rows <= up_to: launches for different tile sizes share one table, and unused slots have no rows.

    Args:
        tiles: int32 [slots, 4], see :func:`~routing._write_tiles`.
        inputs: [rows, K], sorted by expert: of the compute type, or E4M3 codes with row_scale float32 [rows].
        weight: words int32 [E, N, K / 8] (INT4), E4M3 [E, N, K] (FP8) or [E, K, N] (PLAIN), with N = columns, or
            2 * columns where GATED, gate first.
        weight_scale: [E, K >> block_shift, N] (INT4), [E, 1, N] (FP8).
        output: [rows, columns]. Row r of the input goes to row targets[r] unless GATED, which keeps the order.
    """
    RANK: tl.constexpr = 2 if SPLIT == 1 else 3
    TYPE: tl.constexpr = output.dtype.element_ty
    # Multiples of 64 anyway; so the compiler sees that masks never split 16 bytes.
    K = K // 64 * 64
    columns = columns // 64 * 64
    blocks = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    group = program // (TOGETHER * blocks)
    size = tl.minimum(slots - group * TOGETHER, TOGETHER)
    within = program % (TOGETHER * blocks)
    tile = tiles + 4 * (group * TOGETHER + within % size)
    count = tl.load(tile + 2)
    if (count <= above) | (count > up_to):
        return
    expert = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    # Rows are never negative, so this is 0; only the compiler does not know it.
    zero = tl.load(tile + 2 + _lane(1, 1, RANK)) >> 31
    N = columns * 2 if GATED else columns
    start = (within // size) * COLUMNS
    column = start + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, TILE)[:, None]
    mine = inputs + first.to(tl.int64) * K
    if WEIGHTS == PLAIN:
        result = tl.zeros((TILE, COLUMNS), tl.float32)
        mine_weight = weight + expert * N * K
        result, up = _plain_products(
            result, result, mine, mine_weight, row, column, count, K, columns, N, GATED, DEPTH
        )  # fmt: skip
    else:
        acc = tl.zeros((COLUMNS, TILE) if SPLIT == 1 else (SPLIT, COLUMNS, TILE), tl.float32)
        left = start + _lane(COLUMNS, 0, RANK)
        right = _lane(TILE, 0, RANK)
        if WEIGHTS == INT4:
            mine_weight = weight + expert * N * (K // 8)
            mine_scale = weight_scale + expert * (K >> block_shift) * N
            acc, acc_up = _int4_products(
                acc, acc, mine, mine_weight, mine_scale, right, left, count, zero, N, K, columns, block_shift,
                GATED, SPLIT, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            mine_weight = weight + expert * N * K
            acc, acc_up = _fp8_products(
                acc, acc, mine, mine_weight, right, left, count, K, columns, GATED, SPLIT, DEPTH
            )
        result = tl.trans(acc if SPLIT == 1 else tl.sum(acc, axis=0))
        up = tl.trans(acc_up if SPLIT == 1 else tl.sum(acc_up, axis=0))
    inside = (row < count) & (column < columns)
    if WEIGHTS == FP8:
        place = weight_scale + expert * N + column
        by_row = tl.load(row_scale + first + row, mask=row < count, other=0.0)
        result = result * by_row * tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
        if GATED:
            up = up * by_row * tl.load(place + columns, mask=column < columns, other=0.0).to(tl.float32)
    result = result.to(TYPE)
    target = (first + row).to(tl.int64)
    if GATED:
        gate = result.to(tl.float32)
        result = (gate * tl.sigmoid(gate) * up.to(TYPE).to(tl.float32)).to(TYPE)
    else:
        target = tl.load(targets + first + row, mask=row < count, other=0).to(tl.int64)
    tl.store(output + target * columns + column, result, mask=inside)


@triton.jit
def moe_quantize(values, codes, scales, width, BLOCK: tl.constexpr):
    """Program r: row r of values [rows, width] as E4M3 codes under absmax / 448, scales float32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        part = tl.load(values + row * width + start + lane, mask=start + lane < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(part.to(tl.float32)))
    scale = fp8_scale(tl.max(largest, axis=0))
    tl.store(scales + row, scale)
    for start in range(0, width, BLOCK):
        part = tl.load(values + row * width + start + lane, mask=start + lane < width, other=0.0)
        tl.store(codes + row * width + start + lane, fp8_codes(part.to(tl.float32), scale), mask=start + lane < width)


@triton.jit
def moe_sum(rows, y, H, K, BLOCK: tl.constexpr):
    """Program (t, block): ``y[t] = sum of rows[t * K .. t * K + K - 1]``, in float32."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(K):
        total += tl.load(rows + (token * K + rank) * H + lane, mask=lane < H, other=0.0).to(tl.float32)
    tl.store(y + token * H + lane, total.to(y.dtype.element_ty), mask=lane < H)
