"""SHA-256 of a file and of regions of it, in one pass over its bytes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from l4convert.progress import Task

BLOCK_BYTES = 1 << 20  # stays in a cache between the digest of the region and that of the file


class RegionDigest:
    """Digests regions of an open file in file order, and from the same reads the file as a whole.

    Args:
        descriptor: An open file; read with ``pread``, so its position does not matter.
        task: Told of every byte read.
    """

    def __init__(self, descriptor: int, task: Task | None = None) -> None:
        self._descriptor = descriptor
        self._task = task
        self._file = hashlib.sha256()
        self._position = 0
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._region: hashlib._Hash | None = None

    def begin(self, start: int) -> None:
        """Begin a region; what was skipped since the last one counts for the file.

        Raises:
            OSError: The file ends before ``start``, or cannot be read.
            ValueError: ``start`` lies before the end of the last region.
        """
        if start < self._position:
            raise ValueError("regions must come in file order")
        self._read(start, None)
        self._region = hashlib.sha256()

    def extend(self, stop: int) -> None:
        """Digest the region's bytes up to ``stop``.

        Raises:
            OSError: The file ends before ``stop``, or cannot be read.
        """
        self._read(stop, self._region)

    def end(self) -> str:
        """SHA-256 of the region as far as it was extended."""
        assert self._region is not None
        return self._region.hexdigest()

    def region(self, start: int, stop: int) -> str:
        """SHA-256 of the bytes from ``start`` to ``stop``; what was skipped since the last region counts for the file.

        Raises:
            OSError: The file ends before ``stop``, or cannot be read.
            ValueError: ``start`` lies before the end of the last region.
        """
        self.begin(start)
        self.extend(stop)
        return self.end()

    def whole(self, size: int) -> str:
        """SHA-256 of the file's first ``size`` bytes; asked once, at the end.

        Raises:
            OSError: The file is shorter, or cannot be read.
        """
        self._read(size, None)
        return self._file.hexdigest()

    def _read(self, stop: int, region: hashlib._Hash | None) -> None:
        while self._position < stop:
            wanted = self._buffer[: min(BLOCK_BYTES, stop - self._position)]
            count = os.preadv(self._descriptor, [wanted], self._position)
            if not count:
                raise OSError(errno.EIO, f"the file ends at byte {self._position}, before {stop}")
            self._file.update(wanted[:count])
            if region is not None:
                region.update(wanted[:count])
            self._position += count
            if self._task is not None:
                self._task.advance(count)


def file_digest(path: Path, task: Task | None = None) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file.

    Raises:
        OSError: It cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return size, RegionDigest(descriptor, task).whole(size)
    finally:
        os.close(descriptor)
