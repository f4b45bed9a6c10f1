"""Low-rank updates of a matrix, with the same result on every machine and whatever part is computed at a time."""

from __future__ import annotations

import numpy as np

from l4convert.quantization import native


def add_low_rank(total: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    """``total += scale * left @ right`` in place, in float64, then rounded to float32 once.

    Factors are float32 or narrower, as stored, so products are exact; sums go from the first rank to the last.

    Args:
        total: float32 [N, M] with contiguous rows.
        left: float64 [N, r], C order, of values that float32 has.
        right: float64 [r, M], likewise.
        scale: Of the product.
    """
    if native.AVAILABLE:
        native.add_low_rank(total, left, right, scale)
    else:
        add_low_rank_in_numpy(total, left, right, scale)


def add_low_rank_in_numpy(total: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    """:func:`add_low_rank` by NumPy; the definition."""
    product = np.zeros(total.shape)
    for column, row in zip(left.T, right, strict=True):
        product += column[:, None] * row
    total[...] = total + scale * product
