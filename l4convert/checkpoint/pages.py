"""Bounding how much of the memory-mapped checkpoint counts as this process's memory.

Mapped pages that were read stay in the process's resident set until somebody takes them out, so reading a 200 GB
checkpoint through mappings would show 200 GB. Here a worker's reads are *claims* on ranges of a mapping. Ranges that
no running job claims are unmapped (``MADV_DONTNEED``: the page cache keeps them, only the process forgets them) as soon
as the sum of all ranges passes a budget. Where running jobs alone use up the budget, a tile is copied out in small
steps instead, each unmapped at once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

_STEP_BYTES = 8 << 20  # mapped at a time while copying out

_Range = tuple[int, int, int]  # id of the mapping, first byte, end


class PageBudget:
    """At most ``limit`` bytes of mappings stay resident, and a few megabytes a thread that is copying.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._users: dict[_Range, int] = {}
        self._mappings: dict[int, mmap.mmap] = {}
        self._total = 0

    @contextmanager
    def job(self) -> Iterator[None]:
        """What this thread reads while the context lasts is claimed until it ends."""
        claimed: list[_Range] = []
        _thread.current = (self, claimed)
        try:
            yield
        finally:
            _thread.current = None
            with self._lock:
                for key in claimed:
                    self._users[key] -= 1

    def claim(self, mapping: mmap.mmap, start: int, stop: int, claimed: list[_Range]) -> bool:
        """Whether the range may stay mapped until the job ends."""
        key = (id(mapping), start, stop)
        with self._lock:
            if key not in self._users:
                if self._total + stop - start > self._limit:
                    self._release()
                if self._total + stop - start > self._limit:
                    return False
                self._users[key] = 0
                self._mappings[id(mapping)] = mapping
                self._total += stop - start
            self._users[key] += 1
            claimed.append(key)
            return True

    def _release(self) -> None:
        """Unmap every range that no job uses."""
        for key in [key for key, users in self._users.items() if not users]:
            number, start, stop = key
            unmap(self._mappings[number], start, stop)
            del self._users[key]
            self._total -= stop - start
        used = {number for number, _, _ in self._users}
        self._mappings = {number: mapping for number, mapping in self._mappings.items() if number in used}


class _Thread(threading.local):
    current: tuple[PageBudget, list[_Range]] | None = None


_thread = _Thread()


def read_tile(mapping: mmap.mmap, offset: int, matrix: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """``matrix[rows, cols]``, a view of the mapping or, where the budget of this thread's job is used up, a copy.

    Args:
        mapping: What ``matrix`` looks into.
        offset: Where in the mapping ``matrix`` begins, in bytes.
        matrix: [R, C], C order.
        rows: Explicit bounds, step 1.
        cols: Likewise.
    """
    if _thread.current is None:
        view: np.ndarray = matrix[rows, cols]
        return view
    budget, claimed = _thread.current
    pitch = matrix.shape[1] * matrix.itemsize
    # Whole rows, so that jobs which take different columns of the same rows share one claim.
    if budget.claim(mapping, offset + rows.start * pitch, offset + rows.stop * pitch, claimed):
        return matrix[rows, cols]
    copy = np.empty((rows.stop - rows.start, cols.stop - cols.start), matrix.dtype)
    step = max(1, _STEP_BYTES // max(1, pitch))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        copy[start - rows.start : stop - rows.start] = matrix[start:stop, cols]
        unmap(mapping, offset + start * pitch, offset + stop * pitch)
    return copy


def unmap(mapping: mmap.mmap, start: int, stop: int) -> None:
    """Take the pages that hold these bytes out of the resident set; reading them again maps them again."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, min(stop, len(mapping)) - first)
