"""Which slots of the caches hold which tokens of each row: what can be forgotten for nothing, and what is gone.

A graph counts positions from the attention mask and takes a 0 for padding wherever it stands (DESIGN section 5), so a
token is forgotten by a 0 in its column; its keys and values stay where they are and are seen by nobody. What cannot be
had back that way are slots of a chunked layer that were given up: such a layer keeps one chunk, the one that a row's
next token falls in.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from l4convert.runtime.runner import IntArray

BoolArray = npt.NDArray[np.bool_]


class Occupancy(Protocol):
    """What is known of the slots of one batch.

    Attributes:
        lengths: Tokens of each row, int64 [B].
    """

    lengths: IntArray

    def mask(self, new: IntArray) -> IntArray:
        """The graph's mask [B, past + S] for a call with new tokens where ``new`` [B, S] is 1."""
        ...

    def append(self, new: IntArray) -> None:
        """A call with these new tokens is done."""
        ...

    def lost(self, lengths: IntArray, held: int) -> BoolArray:
        """Rows [B] that cannot go back to ``lengths`` because a chunked layer gave up a slot they would need.

        Args:
            lengths: Tokens that each row is to keep, [B].
            held: Slots of the chunked layers' caches.
        """
        ...

    def cut(self, lengths: IntArray) -> int:
        """Forget all but the first ``lengths`` tokens of each row; give the number of last slots no row uses now."""
        ...

    def take(self, rows: IntArray) -> Self:
        """A copy with these rows."""
        ...


class Columns:
    """Growing and windowed caches: one slot for each column of the mask, or for its last columns."""

    def __init__(self, mask: IntArray, chunk: int) -> None:
        """Args: mask [B, columns] of what the caches hold, 1 for tokens; chunk: C."""
        self.lengths: IntArray = mask.sum(axis=1)
        self._columns = mask
        self._chunk = chunk

    def mask(self, new: IntArray) -> IntArray:
        """See :class:`Occupancy`."""
        return np.concatenate([self._columns, new], axis=1)

    def append(self, new: IntArray) -> None:
        """See :class:`Occupancy`."""
        self._columns = self.mask(new)
        self.lengths = self.lengths + new.sum(axis=1)

    def lost(self, lengths: IntArray, held: int) -> BoolArray:
        """See :class:`Occupancy`: a token of a row's chunk lies in front of the columns that are held."""
        gone = self._columns.shape[1] - held
        before: IntArray = self._columns[:, :gone].sum(axis=1)  # tokens in columns that chunked layers gave up
        return (lengths % self._chunk > 0) & (lengths // self._chunk * self._chunk < before)

    def cut(self, lengths: IntArray) -> int:
        """See :class:`Occupancy`."""
        kept = self._columns * (self._columns.cumsum(axis=1) <= lengths[:, None])
        used = np.flatnonzero(kept.any(axis=0))
        columns = int(used[-1]) + 1 if used.size else 0
        trailing: int = kept.shape[1] - columns
        self._columns = kept[:, :columns]
        self.lengths = lengths.copy()
        return trailing

    def take(self, rows: IntArray) -> Columns:
        """See :class:`Occupancy`."""
        return Columns(self._columns[rows], self._chunk)


class Slots:
    """Static caches: a token's slot is its position, in chunked layers its position mod C."""

    def __init__(self, lengths: IntArray, chunk: int, held: IntArray | None = None) -> None:
        """Args: lengths [B]; chunk: C; held [B]: the chunk whose tokens the chunked layers' slots of a row hold."""
        self.lengths = lengths.copy()
        self._chunk = chunk
        self._held: IntArray = lengths // chunk if held is None else held.copy()

    def mask(self, new: IntArray) -> IntArray:
        """See :class:`Occupancy`: such a graph only counts the columns of the past, so padding goes to the front."""
        past = int(self.lengths.max())
        if len(self.lengths) == 1:
            result = np.ones((1, past + new.shape[1]), np.int64)
        else:
            result = np.zeros((len(new), past + new.shape[1]), np.int64)
            result[:, :past] = np.arange(past) >= past - self.lengths[:, None]
        result[:, past:] = new
        return result

    def append(self, new: IntArray) -> None:
        """See :class:`Occupancy`.

        A row without a new token may have had padding written behind its last token: harmless, unless that was the
        last slot of its chunk and the padding went to the first.
        """
        counts = new.sum(axis=1)
        self.lengths = self.lengths + counts
        self._held = np.where(counts > 0, self.lengths - 1, self.lengths) // self._chunk

    def lost(self, lengths: IntArray, held: int) -> BoolArray:
        """See :class:`Occupancy`: the slots hold tokens of another chunk."""
        result: BoolArray = (lengths % self._chunk > 0) & (lengths // self._chunk != self._held)
        return result

    def cut(self, lengths: IntArray) -> int:
        """See :class:`Occupancy`; buffers keep their size."""
        self.lengths = lengths.copy()
        return 0

    def take(self, rows: IntArray) -> Slots:
        """See :class:`Occupancy`."""
        return Slots(self.lengths[rows], self._chunk, self._held[rows])
