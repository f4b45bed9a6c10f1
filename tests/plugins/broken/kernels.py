"""Kernels that the build must refuse."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def undefined(x, COUNT: tl.constexpr):
    """A name that does not exist."""
    tl.store(x + tl.arange(0, COUNT), nowhere)  # noqa: F821


@triton.jit
def described(x, COUNT: tl.constexpr):
    """A descriptor that is made on the device takes scratch memory."""
    block = tl.make_tensor_descriptor(x, shape=[COUNT, COUNT], strides=[COUNT, 1], block_shape=[COUNT, COUNT])
    block.store([0, 0], block.load([0, 0]) * 2)


@triton.jit
def large(x, y, COUNT: tl.constexpr):
    """A product whose operands do not fit the shared memory of a block."""
    index = tl.arange(0, COUNT)
    place = index[:, None] * COUNT + index[None, :]
    total = tl.zeros((COUNT, COUNT), tl.float32)
    for step in range(8):
        total = tl.dot(tl.load(x + step * COUNT * COUNT + place), tl.load(y + step * COUNT * COUNT + place), total)
    tl.store(y + place, total.to(tl.bfloat16))
