"""A kernel that uses what the ops' kernels use: a nested function, a loop, a dot, casts, all kinds of arguments."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(codes, scale):
    """Signed bytes times one scale a column."""
    return (codes.to(tl.float32) * scale).to(tl.bfloat16)


@triton.jit
def scaled_product(
    x, codes, scales, y, rows, depth, bias, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """y [rows, COLUMNS * programs] = x [rows, depth] @ (codes [depth, columns] * scales [columns]) + bias."""
    columns = tl.num_programs(1) * COLUMNS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(scales + column)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        left = tl.load(x + row[:, None] * depth + inner[None, :], mask=row[:, None] < rows, other=0.0)
        right = decode(tl.load(codes + inner[:, None] * columns + column[None, :]), scale[None, :])
        total = tl.dot(left, right, total)
    address = y + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(address, (total + bias).to(tl.bfloat16), mask=row[:, None] < rows)


@triton.jit
def convert(x, bf16, fp16, fp8, sums, COUNT: tl.constexpr):
    """A float32 in every type that the ops store, and the sum of what was stored."""
    index = tl.arange(0, COUNT)
    value = tl.load(x + index)
    tl.store(bf16 + index, value.to(tl.bfloat16))
    tl.store(fp16 + index, value.to(tl.float16))
    tl.store(fp8 + index, value.to(tl.float8e4nv))
    tl.store(sums, tl.sum(value.to(tl.bfloat16).to(tl.float32)))


@triton.jit
def add_bfloat16(x, y, COUNT: tl.constexpr):
    """What the interpreter cannot do."""
    index = tl.arange(0, COUNT)
    value = tl.load(x + index)
    tl.store(y + index, value + value)
