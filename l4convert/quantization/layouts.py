"""Quantized values in the byte layouts of runtimes' kernels, and back.

Both kernels of ONNX Runtime keep two values a byte, the earlier one along K in the low nibble, as unsigned numbers
around a zero point of 8 (ONNX Runtime, docs/ContribOperators.md: MatMulNBits and QMoE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import Derived, LazyTensor, pack_rows
from l4convert.quantization import native

ZERO_POINT = 8
# Two's complement nibbles become offset ones, and back, by flipping their upper bit; both nibbles of a byte at once.
_FLIP = np.uint8(0x88)
# Joined to words together, so that temporaries stay in a core's cache.
_JOINED_COLUMNS = 256


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


def words(values: LazyTensor) -> LazyTensor:
    """Codes as 32-bit words, for runtimes that gather from words but not from 4-bit or FP8 tensors.

    Args:
        values: INT4 or FLOAT8E4M3FN [E, K, N]; N is a multiple of the codes in a word, 8 or 4.

    Returns:
        INT32 [E, K, N / codes]: the stored bytes of ``values``, so the lowest bits are the first code.
    """
    codes = 32 // values.dtype.bitwidth
    if values.dims[-1] % codes:
        raise ValueError(f"{values!r}: rows are not a whole number of words of {codes} codes")
    return _Words(values, codes)


def ordered_words(values: LazyTensor, group: int, order: Sequence[int]) -> LazyTensor:
    """INT4 codes as 32-bit words along K, reordered inside groups of K, for the kernels of ``l4convert::MoE``.

    Args:
        values: INT4 [E, N, K]; K is a multiple of ``group``.
        group: Codes that are reordered among themselves, a multiple of 8.
        order: Slot s of a group takes its code ``order[s]``.

    Returns:
        INT32 [E, N, K / 8]; the lowest bits of a word are the first slot.
    """
    _require(values, axes=3)
    if values.dims[-1] % group:
        raise ValueError(f"{values!r}: K is not a multiple of {group}")
    return _OrderedWords(values, group, order)


def long_words(values: LazyTensor) -> LazyTensor:
    """FP8 codes as 64-bit words along K, in order, for the kernels of ``l4convert::MoE``.

    Args:
        values: FLOAT8E4M3FN [E, N, K]; K is a multiple of 8.

    Returns:
        INT64 [E, N, K / 8]; the lowest byte of a word is the first code.
    """
    if values.dtype != ir.DataType.FLOAT8E4M3FN or len(values.dims) != 3 or values.dims[-1] % 8:
        raise ValueError(f"{values!r}: expected FP8 codes [E, N, K] with K a multiple of 8")
    return _LongWords(values)


def pack(values: np.ndarray) -> np.ndarray:
    """Pack [..., 2n] values in [-8, 7] (INT4 or any integer type) into uint8 [..., n]."""
    flat = values.astype(np.int8).reshape(-1, values.shape[-1])
    return (pack_rows(flat) ^ _FLIP).reshape(*values.shape[:-1], -1)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The inverse of :func:`pack`, and of :func:`qmoe`: uint8 [..., n] to int8 [..., 2n]."""
    stored = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return stored.astype(np.int8) - np.int8(ZERO_POINT)


def reorder_nibbles(packed: np.ndarray, group: int, order: Sequence[int]) -> np.ndarray:
    """Reorder 4-bit codes, two a byte, inside groups: slot s takes code ``order[s]`` of its group.

    Args:
        packed: uint8 [R, n * group / 2].
        group: Codes in a group.
        order: A permutation of ``range(group)``.

    Returns:
        uint8 of the same shape.
    """
    if native.AVAILABLE and group == native.REORDERED:
        return native.reorder(packed, order)
    codes = np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(-1, group)
    return pack_rows(codes[:, list(order)]).reshape(packed.shape)


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


class _Words(Derived):
    def __init__(self, values: LazyTensor, codes: int) -> None:
        batch, rows, cols = values.matrix
        shape = [*values.dims[:-1], values.dims[-1] // codes]
        super().__init__([values], ir.DataType.INT32, shape, (batch, rows, cols // codes))
        self._codes = codes

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        values = self.parts[0]
        part = (batch, rows, slice(cols.start * self._codes, cols.stop * self._codes))
        stored = values.packed(*part) if values.dtype.bitwidth == 4 else values.tile(*part).view(np.uint8)
        return np.ascontiguousarray(stored).view("<i4")


class _OrderedWords(Derived):
    def __init__(self, values: LazyTensor, group: int, order: Sequence[int]) -> None:
        batch, rows, cols = values.matrix
        super().__init__([values], ir.DataType.INT32, [*values.dims[:-1], cols // 8], (batch, rows, cols // 8))
        self._group, self._order = group, tuple(order)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        words = self._group // 8
        first, last = cols.start // words, -(-cols.stop // words)
        stored = self.parts[0].packed(batch, rows, slice(first * self._group, last * self._group))
        ordered = reorder_nibbles(stored, self._group, self._order).view("<i4")
        return ordered[:, cols.start - first * words : cols.stop - first * words]


class _LongWords(Derived):
    def __init__(self, values: LazyTensor) -> None:
        batch, rows, cols = values.matrix
        super().__init__([values], ir.DataType.INT64, [*values.dims[:-1], cols // 8], (batch, rows, cols // 8))

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        codes = self.parts[0].tile(batch, rows, slice(cols.start * 8, cols.stop * 8)).view(np.uint8)
        return (codes.view("<u8") if codes.flags.c_contiguous else _join_columns(codes)).view("<i8")


def _join_columns(codes: np.ndarray) -> np.ndarray:
    """Eight bytes of a row as a word: uint8 [R, 8n], contiguous along columns, to uint64 [R, n].

    Neighbours are joined while whole columns are at hand, so that words are transposed, not bytes.
    """
    words = np.empty((codes.shape[0], codes.shape[1] // 8), "<u8")
    for start in range(0, codes.shape[1], _JOINED_COLUMNS):
        part = codes[:, start : start + _JOINED_COLUMNS].T
        for kind in ("<u2", "<u4", "<u8"):
            bits = 8 * part.itemsize
            upper = part[1::2].astype(kind)
            upper <<= bits
            part = np.bitwise_or(part[0::2], upper, out=upper)
        words[:, start // 8 : start // 8 + len(part)] = part.T
    return words
