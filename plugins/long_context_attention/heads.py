"""What is done to new queries and keys before they are multiplied (definition.prepare_heads), for Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def rotate(x, cos, sin, R: tl.constexpr, D: tl.constexpr):
    """Turn adjacent pairs of float32 [R, D] by the angles whose cosines and sines are [R, D/2] (or [1, D/2])."""
    even, odd = tl.split(tl.reshape(x, [R, D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [R, D])


@triton.jit
def normalize(x, epsilon, D: tl.constexpr):
    """RMS norm without weights of each row of float32 [R, D]."""
    return x * tl.rsqrt(tl.sum(x * x, 1) / D + epsilon)[:, None]


@triton.jit
def rope_and_norm(x, cos, sin, slot, rope, table_rows, epsilon, R: tl.constexpr, D: tl.constexpr):
    """Float32 [R, D] rotated (if ``rope``) by the table's rows ``slot`` [R or 1], then normed (if ``epsilon``)."""
    if rope != 0:
        pair = tl.arange(0, D // 2)
        # A row that the table lacks would be a wrong call; it must not become a wild read.
        at = tl.minimum(slot, table_rows - 1).to(tl.int64)[:, None] * (D // 2) + pair[None, :]
        x = rotate(x, tl.load(cos + at), tl.load(sin + at), R, D)
    if epsilon > 0:
        x = normalize(x, epsilon, D)
    return x


@triton.jit
def temperature(position, floor_scale, attn_scale):
    """1 + attn_scale * ln(1 + floor((p + 1) / floor_scale)), the quotient in float32 as the definition has it."""
    steps = tl.floor(tl.div_rn((position + 1).to(tl.float32), floor_scale))
    return 1.0 + attn_scale * tl.log(1.0 + steps)
