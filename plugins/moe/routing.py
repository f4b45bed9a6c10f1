"""Triton kernels that choose experts and put the tokens' scaled rows in the experts' order.

Up to 64 tokens one launch does it all (:func:`moe_route`). More take three: :func:`moe_choose` writes what each token
chose and how often each expert was chosen in its block of tokens, :func:`moe_scan` turns these counts into first rows
and into the table of tiles, :func:`moe_place` writes the rows. Rows of one expert are in the order of their tokens, so
two calls give the same bits.
"""

import triton
import triton.language as tl

from l4convert.plugins.moe.rounding import fp8_codes, fp8_scale


@triton.jit
def _keys(logits, tokens, experts, T, E):
    """int32 [tokens, experts] that order as the logits do; equal logits have equal keys; padding comes last."""
    inside = (tokens < T)[:, None] & (experts < E)[None, :]
    values = tl.load(logits + tokens.to(tl.int64)[:, None] * E + experts[None, :], mask=inside, other=0.0)
    values = tl.where(values == 0.0, 0.0, values)  # -0 equals 0
    bits = values.to(tl.int32, bitcast=True)
    # A float's bits order as integers once the magnitude of negative ones is turned round. The least is for padding.
    keys = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)
    return tl.where(inside, keys, -0x7FFFFFFF - 1)


@triton.jit
def _best(keys, experts, EXPERTS: tl.constexpr):
    """The first of the largest keys in each row: its expert and a mask of it."""
    largest = tl.max(keys, axis=1)
    expert = tl.min(tl.where(keys == largest[:, None], experts[None, :], EXPERTS), axis=1)
    return expert, experts[None, :] == expert[:, None]


@triton.jit
def _write_row(rows, row_scale, x, score, token, position, H, FP8: tl.constexpr, BLOCK: tl.constexpr):
    """``rows[position] = score * x[token]``, rounded to the compute type; for FP8 as codes under the row's scale."""
    TYPE: tl.constexpr = x.dtype.element_ty
    source = x + token.to(tl.int64) * H
    target = rows + position.to(tl.int64) * H
    lane = tl.arange(0, BLOCK)
    if FP8:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, H, BLOCK):
            part = tl.load(source + start + lane, mask=start + lane < H, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs((part * score).to(TYPE).to(tl.float32)))
        scale = fp8_scale(tl.max(largest, axis=0))
        tl.store(row_scale + position, scale)
        for start in range(0, H, BLOCK):
            part = tl.load(source + start + lane, mask=start + lane < H, other=0.0).to(tl.float32)
            codes = fp8_codes((part * score).to(TYPE).to(tl.float32), scale)
            tl.store(target + start + lane, codes, mask=start + lane < H)
    else:
        for start in range(0, H, BLOCK):
            part = tl.load(source + start + lane, mask=start + lane < H, other=0.0).to(tl.float32)
            tl.store(target + start + lane, (part * score).to(TYPE), mask=start + lane < H)


@triton.jit
def _write_tiles(tiles, first, counts, experts, slots, tile):
    """The table of tiles, int32 [slots, 4]: expert, first row, rows (0 in slots that nobody needs), unused."""
    needed = (counts + tile - 1) // tile
    start = tl.cumsum(needed, axis=0) - needed
    used = tl.sum(needed, axis=0)
    for i in range(tl.max(needed, axis=0)):
        entry = tiles + 4 * (start + i)
        has = i < needed
        tl.store(entry, experts, mask=has)
        tl.store(entry + 1, first + i * tile, mask=has)
        tl.store(entry + 2, tl.minimum(counts - i * tile, tile), mask=has)
    for i in range(used, slots):
        tl.store(tiles + 4 * i + 2, 0)


@triton.jit
def moe_route(
    x, logits, rows, row_scale, targets, tiles, T, E, H, K, slots, tile,
    FP8: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program t routes token t; all find the same routing of all T <= TOKENS tokens. Program 0 also writes the tiles.

    Args:
        x: [T, H]; logits: float32 [T, E].
        rows: [T * K, H], scaled inputs in the experts' order; row_scale: float32 [T * K], for FP8.
        targets: int32 [T * K], for each row ``token * K + rank``; tiles: int32 [slots, 4].
    """
    token = tl.program_id(0)
    tokens = tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    keys = _keys(logits, tokens, experts, T, E)
    left = keys
    chosen = tl.zeros((TOKENS, EXPERTS), tl.int32)
    for _ in range(K):
        _, mask = _best(left, experts, EXPERTS)
        chosen = tl.where(mask & (tokens < T)[:, None], 1, chosen)
        left = tl.where(mask, -0x7FFFFFFF - 1, left)
    counts = tl.sum(chosen, axis=0)
    first = tl.cumsum(counts, axis=0) - counts
    # Rows of earlier tokens of the same expert come before this token's.
    position = first + tl.sum(tl.where((tokens < token)[:, None], chosen, 0), axis=0)
    if token == 0:
        _write_tiles(tiles, first, counts, experts, slots, tile)
    mine = tl.load(logits + token * E + experts, mask=experts < E, other=0.0)
    left = tl.sum(tl.where((tokens == token)[:, None], keys, 0), axis=0)
    for rank in range(K):
        expert, mask = _best(left[None, :], experts, EXPERTS)
        here = experts == tl.sum(expert, axis=0)
        score = tl.sigmoid(tl.sum(tl.where(here, mine, 0.0), axis=0))
        row = tl.sum(tl.where(here, position, 0), axis=0)
        tl.store(targets + row, token * K + rank)
        _write_row(rows, row_scale, x, score, token, row, H, FP8, BLOCK)
        left = tl.where(here, -0x7FFFFFFF - 1, left)


@triton.jit
def moe_choose(logits, choices, counts, T, E, K, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """Program b: the K experts of tokens b * TOKENS ..., and how many of these tokens chose each expert.

    Args:
        logits: float32 [T, E]; choices: int32 [T, K], best first; counts: int32 [blocks, EXPERTS].
    """
    block = tl.program_id(0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, EXPERTS)
    left = _keys(logits, tokens, experts, T, E)
    count = tl.zeros((EXPERTS,), tl.int32)
    for rank in range(K):
        expert, mask = _best(left, experts, EXPERTS)
        tl.store(choices + tokens.to(tl.int64) * K + rank, expert, mask=tokens < T)
        count += tl.sum(tl.where(mask & (tokens < T)[:, None], 1, 0), axis=0)
        left = tl.where(mask, -0x7FFFFFFF - 1, left)
    tl.store(counts + block * EXPERTS + experts, count)


@triton.jit
def moe_scan(counts, tiles, blocks, slots, tile, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: counts[b, e] becomes the first row of block b's tokens of expert e; writes the tiles."""
    experts = tl.arange(0, EXPERTS)
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, blocks, CHUNK):
        block = (start + lane)[:, None]
        total += tl.sum(tl.load(counts + block * EXPERTS + experts[None, :], mask=block < blocks, other=0), axis=0)
    first = tl.cumsum(total, axis=0) - total
    _write_tiles(tiles, first, total, experts, slots, tile)
    row = first
    for start in range(0, blocks, CHUNK):
        block = (start + lane)[:, None]
        place = counts + block * EXPERTS + experts[None, :]
        count = tl.load(place, mask=block < blocks, other=0)
        tl.store(place, row[None, :] + tl.cumsum(count, axis=0) - count, mask=block < blocks)
        row += tl.sum(count, axis=0)


@triton.jit
def moe_place(
    x, logits, choices, first, rows, row_scale, targets, T, E, H, K,
    FP8: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program t writes the rows of token t.

    Args:
        choices: int32 [T, K] of :func:`moe_choose`; first: int32 [blocks, EXPERTS] of :func:`moe_scan`; the others as
            in :func:`moe_route`.
    """
    token = tl.program_id(0)
    block = token // TOKENS
    before = block * TOKENS + tl.arange(0, TOKENS)
    for rank in range(K):
        expert = tl.load(choices + token.to(tl.int64) * K + rank)
        row = tl.load(first + block * EXPERTS + expert)
        for other in range(K):
            choice = tl.load(choices + before.to(tl.int64) * K + other, mask=before < token, other=-1)
            row += tl.sum((choice == expert).to(tl.int32), axis=0)
        score = tl.sigmoid(tl.load(logits + token.to(tl.int64) * E + expert))
        tl.store(targets + row, token * K + rank)
        _write_row(rows, row_scale, x, score, token, row, H, FP8, BLOCK)
