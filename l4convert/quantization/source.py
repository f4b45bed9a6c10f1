"""Reading the weights that are about to be quantized."""

from __future__ import annotations

import numpy as np

from l4convert.checkpoint.finite import count_broken
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.errors import InputError


def require_finite(tile: np.ndarray, weight: LazyTensor, batch: int, rows: slice) -> None:
    """Refuse a tile, of these rows of a weight, that is not finite.

    Raises:
        InputError: Names the weight and how many of its values are NaN or infinite.
    """
    if broken := count_broken(tile):
        others = len(weight.sources) - 1
        more = f" (or one of {others} tensors it is joined with)" if others > 0 else ""
        place = f"rows {rows.start} to {rows.stop - 1} of matrix {batch}"
        raise InputError(
            f"{weight.origin}{more} has {broken} NaN or infinite values in {place}",
            "the checkpoint is damaged: compare its files' digests with the publisher's",
        )
