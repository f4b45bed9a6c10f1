"""Transposing matrices of 4-bit codes while they stay packed."""

from __future__ import annotations

import numpy as np

# Bytes of a row, and rows, that are turned together, so that temporaries stay in a core's cache.
_COLUMNS = 256
_ROWS = 1024


def transpose_packed(packed: np.ndarray) -> np.ndarray:
    """Transpose a matrix of 4-bit codes [R, 2m] that are packed along rows, the earlier one in the low half of a byte.

    Neighbours are joined to words of 64 bits while whole rows are at hand, so that words are transposed, not codes.

    Args:
        packed: uint8 [R, m]; R is even.

    Returns:
        uint8 [2m, R / 2], packed the same way.
    """
    rows, width = packed.shape
    result = np.empty((2 * width, rows // 2), np.uint8)
    joined = rows // 16 * 16  # codes of a column in whole words
    words = result[:, : joined // 2]
    for row in range(0, joined, _ROWS):
        for column in range(0, width, _COLUMNS):
            part = packed[row : min(row + _ROWS, joined), column : column + _COLUMNS]
            place = words[2 * column : 2 * (column + part.shape[1]), row // 2 : (row + len(part)) // 2]
            for half, codes in enumerate(_halves(part)):
                place[half::2].view("<u8")[...] = _joined(codes).T
    for half, codes in enumerate(_halves(packed[joined:])):
        result[half::2, joined // 2 :] = codes.T
    return result


def _halves(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes of even and of odd columns, uint8 [R / 2, m], packed along columns: two rows to a byte."""
    upper, lower = packed[0::2], packed[1::2]
    return (upper & 0x0F) | (lower << 4), (upper >> 4) | (lower & 0xF0)


def _joined(rows: np.ndarray) -> np.ndarray:
    """Eight bytes of a column as a word: uint8 [8n, m] to uint64 [n, m], the first in the lowest bits."""
    for kind in ("<u2", "<u4", "<u8"):
        bits = 8 * rows.itemsize
        upper = rows[1::2].astype(kind)
        upper <<= bits
        rows = np.bitwise_or(rows[0::2], upper, out=upper)
    return rows
