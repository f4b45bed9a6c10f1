"""INT4 values in the byte layouts of ONNX Runtime's kernels, and back.

Both kernels keep two values a byte, the earlier one along K in the low nibble, as unsigned numbers around a zero point
of 8 (ONNX Runtime, docs/ContribOperators.md: MatMulNBits and QMoE).
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import Derived, LazyTensor, pack_rows

ZERO_POINT = 8
# Two's complement nibbles become offset ones, and back, by flipping their upper bit; both nibbles of a byte at once.
_FLIP = np.uint8(0x88)


def matmul_nbits(values: LazyTensor, block_size: int) -> LazyTensor:
    """The ``B`` input of ``com.microsoft::MatMulNBits``; its scales are those of the values, [N, ceil(K / block_size)].

    Args:
        values: INT4 [N, K].
        block_size: That of the scales. A short last block is filled up with zero points.

    Returns:
        UINT8 [N, ceil(K / block_size), block_size / 2].
    """
    _require(values, axes=2)
    rows, cols = values.dims
    blocks = -(-cols // block_size)
    return _Packed(values, [rows, blocks, block_size // 2])


def qmoe(values: LazyTensor) -> LazyTensor:
    """The expert weights of ``com.microsoft::QMoE`` (``expert_weight_bits=4``).

    Args:
        values: INT4 [E, N, K], K even.

    Returns:
        UINT8 [E, N, K / 2].
    """
    _require(values, axes=3)
    experts, rows, cols = values.dims
    if cols % 2:
        raise ValueError(f"{values!r}: QMoE packs two values a byte, K must be even")
    return _Packed(values, [experts, rows, cols // 2])


def pack(values: np.ndarray) -> np.ndarray:
    """Pack [..., 2n] values in [-8, 7] (INT4 or any integer type) into uint8 [..., n]."""
    flat = values.astype(np.int8).reshape(-1, values.shape[-1])
    return (pack_rows(flat) ^ _FLIP).reshape(*values.shape[:-1], -1)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pack`, and of :func:`qmoe`: uint8 [..., n] to int8 [..., 2n]."""
    stored = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return stored.astype(np.int8) - np.int8(ZERO_POINT)


def unpack_matmul_nbits(packed: np.ndarray, cols: int) -> np.ndarray:
    """The values int8 [N, K = ``cols``] of a :func:`matmul_nbits` tensor."""
    return unpack(packed).reshape(len(packed), -1)[:, :cols]


def _require(values: LazyTensor, axes: int) -> None:
    if values.dtype != ir.DataType.INT4 or len(values.dims) != axes:
        raise ValueError(f"{values!r}: expected INT4 with {axes} axes")


class _Packed(Derived):
    """INT4 [..., N, K] as bytes, each row filled up with zero points to the length that ``shape`` says."""

    def __init__(self, values: LazyTensor, shape: list[int]) -> None:
        batch, rows, _ = values.matrix
        width = math.prod(shape) // max(1, batch * rows)
        super().__init__([values], ir.DataType.UINT8, shape, (batch, rows, width))

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        values, length = self.parts[0], self.parts[0].matrix[2]
        columns = slice(min(2 * cols.start, length), min(2 * cols.stop, length))
        tile = values.packed(batch, rows, columns)
        missing = cols.stop - cols.start - tile.shape[1]
        if missing:
            tile = np.pad(tile, ((0, 0), (0, missing)))  # a stored zero point is the value 0
        return tile ^ _FLIP
