"""Bounding how much of the memory-mapped checkpoint counts as this process's memory, and reading ahead of the jobs.

Mapped pages that were read stay in the process's resident set until somebody takes them out, so reading a 200 GB
checkpoint through mappings would show 200 GB. Here a worker's reads are *claims* on ranges of a file. Ranges that no
running job claims are unmapped (``MADV_DONTNEED``: the page cache keeps them, only the process forgets them) as soon as
the sum of all ranges passes a budget. Where running jobs alone use up the budget, a tile is copied out in small steps
instead, each unmapped at once.

A claim maps its whole range in one call (``MADV_POPULATE_READ``, Linux 5.14), because a read error then is an error
code, where touching the page would kill the process with SIGBUS. What follows a claim in the file is asked for at the
same time (``MADV_WILLNEED``), since jobs mostly follow the order of the file: the disk works while the cores do.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

_STEP_BYTES = 8 << 20  # mapped at a time while copying out
_AHEAD_BYTES = 256 << 20
_ASK_BYTES = 1 << 20  # Linux cuts a larger request to a disk's largest transfer, often 1.25 MiB (force_page_cache_ra)
_POPULATE_READ = 22  # <asm-generic/mman-common.h>; Python has no name for it
_LINUX = sys.platform == "linux"

_libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise would hold Python's lock while the disk reads
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(eq=False)
class _Range:
    """A claimed range of a mapped file, in bytes; ``users`` running jobs read it."""

    file: np.ndarray
    start: int
    stop: int
    users: int = 0
    populated: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def populate(self) -> None:
        with self.lock:  # whoever else claims the range waits until it is there
            if not self.populated:
                populate(self.file, self.start, self.stop)
                self.populated = True


class PageBudget:
    """At most ``limit`` bytes of mappings stay resident, and a few megabytes a thread that is copying.

    Args:
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._ranges: dict[tuple[int, int, int], _Range] = {}
        self._total = 0
        self._asked: dict[int, int] = {}  # file -> up to where it was asked for
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="readahead")

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)

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
                for one in claimed:
                    one.users -= 1

    def claim(self, file: np.ndarray, start: int, stop: int, claimed: list[_Range]) -> bool:
        """Whether the range may stay mapped until the job ends; if so, all of it is mapped now.

        Raises:
            OSError: It cannot be read.
        """
        key = (address(file), start, stop)
        with self._lock:
            if key not in self._ranges:
                self._ask_ahead(file, stop)
                if self._total + stop - start > self._limit:
                    self._release()
                if self._total + stop - start > self._limit:
                    return False
                self._ranges[key] = _Range(file, start, stop)
                self._total += stop - start
            one = self._ranges[key]
            one.users += 1
            claimed.append(one)
        one.populate()
        return True

    def _release(self) -> None:
        """Unmap every range that no job uses."""
        for key in [key for key, one in self._ranges.items() if not one.users]:
            one = self._ranges.pop(key)
            unmap(one.file, one.start, one.stop)
            self._total -= one.stop - one.start

    def _ask_ahead(self, file: np.ndarray, stop: int) -> None:
        target = min(stop + _AHEAD_BYTES, file.size)
        asked = self._asked.get(address(file), stop)
        begin = asked if stop <= asked <= target else stop
        self._asked[address(file)] = target
        if begin < target:
            self._reader.submit(_ask, file, begin, target)


class _Thread(threading.local):
    current: tuple[PageBudget, list[_Range]] | None = None


_thread = _Thread()


def read_tile(file: np.ndarray, matrix: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """``matrix[rows, cols]``, a view of the file or, where the budget of this thread's job is used up, a copy.

    Args:
        file: A mapped file, uint8 [bytes].
        matrix: [R, C], C order; a view of ``file``.
        rows: Explicit bounds, step 1.
        cols: Likewise.

    Raises:
        OSError: The disk fails, or the file was cut; only while a job of a :class:`PageBudget` runs in this thread.
    """
    if _thread.current is None:
        view: np.ndarray = matrix[rows, cols]
        return view
    budget, claimed = _thread.current
    pitch = matrix.shape[1] * matrix.itemsize
    first = address(matrix) - address(file)
    # Whole rows, so that jobs which take different columns of the same rows share one claim.
    if budget.claim(file, first + rows.start * pitch, first + rows.stop * pitch, claimed):
        return matrix[rows, cols]
    # In columns, because who asks for part of the rows wants to transpose it.
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    copy = np.empty(shape, matrix.dtype, order="F" if shape[1] < matrix.shape[1] else "C")
    step = max(1, _STEP_BYTES // max(1, pitch))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        populate(file, first + start * pitch, first + stop * pitch)
        copy[start - rows.start : stop - rows.start] = matrix[start:stop, cols]
        unmap(file, first + start * pitch, first + stop * pitch)
    return copy


def address(array: np.ndarray) -> int:
    """Where an array's first element is."""
    start: int = array.__array_interface__["data"][0]
    return start


def populate(file: np.ndarray, start: int, stop: int) -> None:
    """Read these bytes of a mapped file into memory; systems without such a call read them when they are touched.

    Raises:
        OSError: The disk fails, or the file ends before ``stop``.
    """
    if _LINUX and _advise(file, start, stop, _POPULATE_READ) not in {0, errno.EINVAL}:
        raise OSError(errno.EIO, "the disk fails, or the file was cut while it was read")


def unmap(file: np.ndarray, start: int, stop: int) -> None:
    """Take the pages that hold these bytes out of the resident set; reading them again maps them again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        _advise(file, start, stop, mmap.MADV_DONTNEED)


def _ask(file: np.ndarray, start: int, stop: int) -> None:
    for begin in range(start, stop, _ASK_BYTES):
        _advise(file, begin, min(begin + _ASK_BYTES, stop), mmap.MADV_WILLNEED)


def _advise(file: np.ndarray, start: int, stop: int, advice: int) -> int:
    """``madvise`` for the pages that hold these bytes; the error's number, or 0."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE  # a mapping begins on a page
    if stop <= first:
        return 0
    while _libc.madvise(address(file) + first, stop - first, advice):
        if (number := ctypes.get_errno()) != errno.EINTR:
            return number
    return 0
