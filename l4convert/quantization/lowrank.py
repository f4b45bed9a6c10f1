"""The product of low-rank factors, in one order of sums on every machine."""

from __future__ import annotations

import numpy as np

from l4convert.quantization import native

#: The most ranks of one call.
MAX_RANKS = native.MAX_RANKS


def add_product(total: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Add ``left @ right`` to ``total`` in place: for k from 0 on, ``total += left[:, k] * right[k]``.

    Every product and every sum is rounded to float32, so the result depends neither on the machine nor on which part
    of a matrix is computed at a time.

    Args:
        total: float32 [N, M], C order.
        left: float32 [N, r], C order; r is at most :data:`MAX_RANKS`.
        right: float32 [r, M], C order.
    """
    if native.AVAILABLE:
        native.add_product(total, left, right)
    else:
        add_product_in_numpy(total, left, right)


def add_product_in_numpy(total: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """:func:`add_product` by NumPy; the definition."""
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row
