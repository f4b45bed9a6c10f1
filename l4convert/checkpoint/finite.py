"""Counting values that are no numbers."""

from __future__ import annotations

import numpy as np


def count_broken(values: np.ndarray) -> int:
    """How many values are NaN or infinite; quietly, though a signalling NaN makes numpy print a warning."""
    with np.errstate(invalid="ignore"):
        return values.size - int(np.count_nonzero(np.isfinite(values)))
