"""Integers packed into 32-bit words, as compressed-tensors' format ``pack-quantized`` has them.

The first integer is in a word's lowest bits; integers are stored with an offset that makes them unsigned
(compressed_tensors/compressors/pack_quantized/helpers.py). On a little-endian machine a row of words is then a row of
bytes, which for 4 bits is ONNX's packing but for the offset.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import Derived, LazyTensor

#: Bits of an integer -> its ONNX type.
PACKED_TYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
# Unsigned with an offset of half the range is two's complement with the upper bit flipped.
_FLIP = {4: np.uint8(0x88), 8: np.uint8(0x80)}


class Unpacked(Derived):
    """Words [..., N, ceil(K bits / 32)] as the integers [..., N, K].

    Args:
        words: INT32.
        bits: 4 or 8.
        depth: K.
    """

    def __init__(self, words: LazyTensor, bits: int, depth: int) -> None:
        super().__init__([words], PACKED_TYPES[bits], [*words.dims[:-1], depth])
        self._bits = bits

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        if self._bits == 8:
            return self._bytes(batch, rows, cols.start, cols.stop).view(np.int8)
        first = cols.start // 2 * 2
        stored = self._bytes(batch, rows, first // 2, -(-cols.stop // 2))
        values = np.empty((stored.shape[0], stored.shape[1], 2), np.uint8)
        np.bitwise_and(stored, 0x0F, out=values[..., 0])
        np.right_shift(stored, 4, out=values[..., 1])
        begin = cols.start - first
        return values.reshape(len(stored), -1)[:, begin : begin + cols.stop - cols.start].view(ml_dtypes.int4)

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._bytes(batch, rows, cols.start // 2, -(-cols.stop // 2), odd=cols.stop % 2 == 1)

    def _bytes(self, batch: int, rows: slice, start: int, stop: int, odd: bool = False) -> np.ndarray:
        """Bytes from ``start`` to ``stop`` of rows, in two's complement; ``odd``: the last upper nibble is to be 0."""
        words = self.parts[0].tile(batch, rows, slice(start // 4, -(-stop // 4)))
        if words.strides[1] != words.itemsize:  # read column by column: bytes of a row have to be neighbours
            words = np.ascontiguousarray(words)
        stored = words.astype("<i4", copy=False).view(np.uint8)
        begin = start - start // 4 * 4
        result: np.ndarray = stored[:, begin : begin + stop - start] ^ _FLIP[self._bits]
        if odd:
            result[:, -1] &= 0x0F
        return result


class UnpackedRows(Derived):
    """Words [ceil(N bits / 32), G] that pack along the rows, as the integers [N, G]: packed zero points.

    Args:
        words: INT32.
        bits: 4 or 8.
        height: N.
    """

    def __init__(self, words: LazyTensor, bits: int, height: int) -> None:
        super().__init__([words], ir.DataType.INT8, [height, words.dims[-1]])
        self._bits = bits

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        each = 32 // self._bits
        first = rows.start // each
        words: Any = self.parts[0].tile(batch, slice(first, -(-rows.stop // each)), cols)
        shifts = np.arange(each, dtype=np.int32)[:, None] * self._bits
        mask, offset = (1 << self._bits) - 1, 1 << (self._bits - 1)
        values: np.ndarray = (
            (((words[:, None, :] >> shifts) & mask) - offset).astype(np.int8).reshape(-1, words.shape[1])
        )
        begin = rows.start - first * each
        return values[begin : begin + rows.stop - rows.start]
