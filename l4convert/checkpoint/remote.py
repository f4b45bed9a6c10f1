"""Files of a checkpoint that lie on a server, and that stand in a folder of this machine without being there.

A folder of Hugging Face's cache that holds a checkpoint's small files is *completed* by such files: each has the path
that it would have there. What reads a checkpoint asks here about a path that has no file. Nothing in this module needs
a network library; :mod:`l4convert.checkpoint.hub` does.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from l4convert.checkpoint.hub.spool import Spool

_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a Git object, or of the content of a file in Git LFS or Xet
# Of a matrix whose columns are wanted, so many bytes of whole rows are held at a time.
_STEP_BYTES = 8 << 20
# The beginning of a file, which is read once: the header of a shard of Llama 4 has about ten kilobytes.
_HEAD_BYTES = 64 << 10
# Tensors up to this size are read in blocks of the file.
_SMALL_BYTES = 4 << 10
_BLOCK_BYTES = 16 << 10
# Ranges that are read at the same time, at least; a server answers one connection slower than a network could.
_CONNECTIONS = 8


@dataclass(frozen=True)
class HubSource:
    """Where a checkpoint came from.

    Attributes:
        repo: ``org/name``.
        commit: The Git commit that its files are of, 40 hexadecimal digits.
    """

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"hf://{self.repo}@{self.commit}"


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, as it was listed. Can be pickled: another machine reads it with its own token.

    Attributes:
        path: Where it would lie on this machine.
        name: How messages call it.
        url: What gives its content, or says where that is; names the commit, so the content never changes.
        size: Bytes.
        etag: What the server says identifies the content: ``sha256``, or a Git object's SHA-1.
        sha256: Of the content, where the server knows it (files in Git LFS, or Xet).
    """

    path: Path
    name: str
    url: str
    size: int
    etag: str
    sha256: str | None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop``, fewer where it ends before; for headers, not for weights.

        Raises:
            RemoteError: They cannot be read.
        """
        stop = min(stop, self.size)
        head = _heads.get(self)
        if head is None and start < _HEAD_BYTES:
            head = _heads[self] = self._fetch(0, min(_HEAD_BYTES, self.size))
        known = (head or b"")[start:stop]
        return known + self._fetch(start + len(known), stop)

    def _fetch(self, start: int, stop: int) -> bytes:
        from l4convert.checkpoint.hub.ranges import read_range

        buffer = bytearray(max(0, stop - start))
        read_range(self, start, memoryview(buffer))
        return bytes(buffer)


class RemoteReader(io.RawIOBase):
    """A file on a server for those who read a little here and there; within an ``io.BufferedReader``."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._position, self._position + len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class Span:
    """The bytes of one tensor in a file: what is read ahead of and kept together."""

    file: RemoteFile
    start: int
    stop: int


_files: dict[Path, RemoteFile] = {}
_heads: dict[RemoteFile, bytes] = {}


def complete(folder: Path, files: Iterable[RemoteFile]) -> None:
    """Let these files, and no other remote ones, stand in ``folder``."""
    for path in [path for path in _files if path.parent == folder]:
        _heads.pop(_files.pop(path), None)
    _files.update({file.path: file for file in files})


def remote_file(path: Path) -> RemoteFile | None:
    """The file on a server that stands at ``path``, unless a file lies there."""
    return None if path.exists() else _files.get(path)


def remote_files(folder: Path) -> list[RemoteFile]:
    """Those that stand in a folder."""
    return [file for path in _files if path.parent == folder and (file := remote_file(path))]


def known_etag(path: Path) -> str | None:
    """What the hub calls the content of a file: of one on a server, and of one in Hugging Face's cache.

    There, ``snapshots/<commit>/<name>`` is a link to ``blobs/<etag>``.
    """
    if file := remote_file(path):
        return file.etag
    content = path.resolve()
    cached = path.parent.parent.name == "snapshots" and content.parent.name == "blobs"
    return content.name if cached and _ETAG.fullmatch(content.name) else None


def is_file(path: Path) -> bool:
    """Whether there is a file, here or on a server."""
    return path.is_file() or path in _files


def names_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder whose names end so, sorted, remote ones included."""
    there = {path for path in _files if path.parent == folder and path.suffix == suffix}
    return sorted(there | set(folder.glob(f"*{suffix}")))


class Streaming:
    """While one is open, ranges of remote files are read ahead, by several connections, and kept for a while.

    Args:
        jobs: How many threads will read.
        again: Bytes that they will read a second time, after as many others.
    """

    def __init__(self, jobs: int, again: int = 0) -> None:
        self.jobs, self._again = jobs, again
        self._connections = max(jobs, _CONNECTIONS)
        self._lock = threading.Lock()
        self._spool: Spool | None = None
        self._stopped = False
        _streams.append(self)

    @property
    def spool(self) -> Spool:
        """Made by the first who needs it."""
        from l4convert.checkpoint.hub.spool import Spool

        with self._lock:
            if self._spool is None:
                self._spool = Spool(self._connections, self.jobs, self._again)
                if self._stopped:
                    self._spool.stop()
            return self._spool

    def stop(self) -> None:
        """Let whoever waits for a server fail soon."""
        with self._lock:
            self._stopped = True
            if self._spool is not None:
                self._spool.stop()

    def close(self) -> None:
        """Forget what was read."""
        _streams.remove(self)
        self.stop()
        if self._spool is not None:
            self._spool.close()


_streams: list[Streaming] = []


@contextmanager
def streaming(jobs: int, again: int = 0) -> Iterator[Streaming]:
    """An open :class:`Streaming`."""
    stream = Streaming(jobs, again)
    try:
        yield stream
    finally:
        stream.close()


def read_tile(span: Span, first: int, shape: tuple[int, int], dtype: np.dtype, rows: slice, cols: slice) -> np.ndarray:
    """``matrix[rows, cols]`` of a matrix in a remote file, as a new array.

    Args:
        span: The tensor.
        first: Where the matrix begins in the file, in bytes.
        shape: Of the matrix, C order.
        dtype: Of its elements.
        rows: Explicit bounds, step 1.
        cols: Likewise.

    Raises:
        RemoteError: It cannot be read.
    """
    pitch = shape[1] * dtype.itemsize
    height, width = rows.stop - rows.start, cols.stop - cols.start
    if width == shape[1]:
        whole = np.empty((height, width), dtype)
        _read(span, first + rows.start * pitch, whole, 0)
        return whole
    # In columns, because who asks for part of the rows wants to transpose it. The next one will ask for other columns
    # of the same rows: those are to be kept.
    part = np.empty((height, width), dtype, order="F")
    step = max(1, min(height, _STEP_BYTES // max(1, pitch)))
    block = np.empty((step, shape[1]), dtype)
    # Of the matrix once more, in case that other jobs are in others: as much as a job takes of one.
    keep = height * pitch + _streams_jobs() * part.nbytes
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        _read(span, first + start * pitch, block[: stop - start], keep)
        part[start - rows.start : stop - rows.start] = block[: stop - start, cols]
    return part


@lru_cache(maxsize=1024)
def _block(file: RemoteFile, index: int) -> bytes:
    """Small tensors (scales, packed weights' shapes) are looked at one by one, thousands of them, and lie together."""
    return file.read(index * _BLOCK_BYTES, (index + 1) * _BLOCK_BYTES)


def _small(file: RemoteFile, start: int, stop: int) -> bytes:
    first, last = start // _BLOCK_BYTES, (stop - 1) // _BLOCK_BYTES
    data = b"".join(_block(file, index) for index in range(first, last + 1))
    return data[start - first * _BLOCK_BYTES : stop - first * _BLOCK_BYTES]


def _streams_jobs() -> int:
    return _streams[-1].jobs if _streams else 0


def _read(span: Span, start: int, array: np.ndarray, keep: int) -> None:
    """Fill a C-contiguous array; ``keep``: so many bytes of the tensor will be asked for again soon."""
    buffer = array.reshape(-1).view(np.uint8).data
    if span.stop - span.start <= _SMALL_BYTES:
        buffer[:] = _small(span.file, start, start + len(buffer))
        return
    if _streams:
        _streams[-1].spool.read(span, start, buffer, keep)
        return
    from l4convert.checkpoint.hub.ranges import read_range

    read_range(span.file, start, buffer)
