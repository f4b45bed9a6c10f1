"""The tokens a batch was fed, for those that have to be fed again, and what is done alike when a stream goes back."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from l4convert.errors import UsageError
from l4convert.runtime.occupancy import Occupancy
from l4convert.runtime.runner import IntArray


class TokenHistory:
    """Token ids of each row: 4 bytes a token, beside thousands in the caches."""

    def __init__(self, lengths: IntArray, ids: npt.NDArray[np.int32] | None = None, base: int | None = None) -> None:
        """Args: lengths [B] of what nobody told the tokens of; ids [B, room]: tokens from position ``base`` on."""
        self._first_known: IntArray = lengths.copy()
        self._ids: npt.NDArray[np.int32] = np.zeros((len(lengths), 0), np.int32) if ids is None else ids
        self._base = int(lengths.min()) if base is None else base

    def append(self, lengths: IntArray, input_ids: IntArray, mask: IntArray) -> None:
        """Remember new tokens [B, S], where the mask is 1, of rows that had ``lengths`` [B] tokens before."""
        counts = mask.sum(axis=1)
        self._first_known = np.minimum(self._first_known, lengths)  # a row may have gone back to before what it knew
        self._reserve(int(lengths.min()), int((lengths + counts).max()))
        for row, (begin, count) in enumerate(zip(lengths - self._base, counts, strict=True)):
            self._ids[row, begin : begin + count] = input_ids[row, mask[row] == 1]

    def known(self, first: IntArray) -> npt.NDArray[np.bool_]:
        """Rows [B] whose tokens from position ``first`` [B] on are known."""
        return first >= self._first_known

    def between(self, first: IntArray, last: IntArray) -> tuple[IntArray, IntArray]:
        """Tokens from position ``first`` [B] to before ``last`` [B]: ids and mask, both [B, S], padded at the end."""
        width = int((last - first).max())
        real = np.arange(width) < (last - first)[:, None]
        ids = np.zeros(real.shape, np.int64)
        for row, (begin, end) in enumerate(zip(first - self._base, last - self._base, strict=True)):
            ids[row, : end - begin] = self._ids[row, begin:end]
        return ids, real.astype(np.int64)

    def take(self, rows: IntArray) -> Self:
        """A copy with these rows."""
        return type(self)(self._first_known[rows], self._ids[rows], self._base)

    def _reserve(self, first: int, last: int) -> None:
        """Make room for positions ``first`` to ``last``; what is made in vain is at most as much as is used."""
        before, have = max(0, self._base - first), self._ids.shape[1]
        need = before + last - self._base
        after = 0 if need <= before + have else max(need, 2 * have, 64) - before - have
        if before or after:
            self._ids = np.pad(self._ids, ((0, 0), (before, after)))
            self._base -= before


class Return(NamedTuple):
    """How rows go back: to ``lengths`` [B], and then forward again by the tokens ``ids`` where ``mask`` [B, S] is 1."""

    lengths: IntArray
    ids: IntArray
    mask: IntArray


def plan_return(tokens: int | IntArray, occupancy: Occupancy, history: TokenHistory, chunk: int, held: int) -> Return:
    """How a stream forgets the last tokens of each row.

    Args:
        tokens: How many, of all rows or of each [B].
        occupancy: Of the stream's caches; ``history``: its tokens; ``chunk``: C.
        held: Slots of the chunked layers' caches.

    Returns:
        The way; nothing is fed again where no slot was lost.

    Raises:
        ValueError: A row has fewer tokens, or a number is negative.
        UsageError: Tokens would have to be fed again that are not known.
    """
    lengths = occupancy.lengths
    amounts = np.broadcast_to(np.asarray(tokens, np.int64), lengths.shape)
    if (amounts < 0).any() or (amounts > lengths).any():
        raise ValueError(f"a rollback of {amounts.tolist()} tokens of rows that have {lengths.tolist()}")
    target = lengths - amounts
    lost = occupancy.lost(target, held)
    first = np.where(lost, target // chunk * chunk, target)
    if not history.known(first)[lost].all():
        raise UsageError(
            f"a rollback to before token {int(target[lost].max())} needs tokens that this stream was not told: its "
            "caches were given to it",
            "Feed the tokens since the last chunk boundary through the stream, or roll back less.",
        )
    return Return(first, *history.between(first, target))
