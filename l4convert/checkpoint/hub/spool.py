"""A bounded part of remote files on this machine's disk: read ahead of the jobs, and kept while columns are taken.

Jobs that need some columns of a matrix read all of its rows, and twenty of them one after the other want the same
matrix. From a disk the page cache serves that; here the ranges that came over the network are put into a file that has
no name (nothing of it survives the process), in slots of one *chunk*, and the least recently used slot is taken anew.
So every byte comes over the network about once, and neither memory nor disk holds a whole shard.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from l4convert.checkpoint.hub.ranges import receive
from l4convert.checkpoint.remote import Span
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

CHUNK_BYTES = 8 << 20
# Chunks of a tensor that are asked for before they are wanted: as many as there are connections.
_AHEAD = 8
# Three of Llama 4's gate_up matrices.
_LEAST_BYTES = 512 << 20
# Three of Scout's tensors with all experts of a layer.
_MOST_AGAIN_BYTES = 8 << 30


@dataclass(eq=False)
class _Chunk:
    """A part of a tensor in a slot of the file; ``users`` threads read it now."""

    slot: int
    nbytes: int
    users: int = 0
    ready: Future[None] = field(default_factory=Future)


_Key = tuple[Path, int, int]


class Spool:
    """Ranges of remote files.

    Args:
        connections: How many ranges are fetched at the same time.
        jobs: How many threads read.
        again: Bytes that will be read a second time, after as many others; room for them is made where the disk has it.
    """

    def __init__(self, connections: int, jobs: int, again: int = 0) -> None:
        self.folder = _scratch_folder()
        self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (closed by close)
        self._executor = ThreadPoolExecutor(connections, thread_name_prefix="ranges")
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._chunks: OrderedDict[_Key, _Chunk] = OrderedDict()  # the least recently used first
        self._free: list[int] = []
        self._slots = 0
        self._jobs = jobs
        room = min(again, _MOST_AGAIN_BYTES, shutil.disk_usage(self.folder).free // 4)
        self._most = max(1, (_LEAST_BYTES + room) // CHUNK_BYTES)

    def read(self, span: Span, start: int, buffer: memoryview, keep: int = 0) -> None:
        """Fill ``buffer`` with bytes of a tensor.

        Args:
            span: The tensor.
            start: Where in the file they begin.
            buffer: Writable.
            keep: So many bytes of the tensor are read by several jobs, each of which wants a part of them.

        Raises:
            RemoteError: They cannot be fetched.
            InputError: There is no room for them on the disk.
        """
        self._make_room(len(buffer), keep)
        position, stop = start, start + len(buffer)
        while position < stop:
            index = (position - span.start) // CHUNK_BYTES
            begin = span.start + index * CHUNK_BYTES
            end = min(begin + CHUNK_BYTES, span.stop, stop)
            with self._held(span, index) as chunk:
                chunk.ready.result()
                offset = chunk.slot * CHUNK_BYTES + position - begin
                self._copy(buffer[position - start : end - start], offset)
            position = end

    def stop(self) -> None:
        """Let everything that waits for a server fail soon, and fetch nothing more."""
        self._stopped.set()

    def close(self) -> None:
        """Give the disk back."""
        self._stopped.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    @contextmanager
    def _held(self, span: Span, index: int) -> Iterator[_Chunk]:
        """A chunk that stays in its slot while the context lasts; those after it are asked for, too."""
        last = min(index + _AHEAD, (span.stop - span.start - 1) // CHUNK_BYTES)
        with self._lock:
            chunk = self._asked(span, index, wanted=True)
            assert chunk is not None
            chunk.users += 1
            for ahead in range(index + 1, last + 1):
                if self._asked(span, ahead, wanted=False) is None:
                    break
        try:
            yield chunk
        finally:
            with self._lock:
                chunk.users -= 1

    def _asked(self, span: Span, index: int, wanted: bool) -> _Chunk | None:
        """The chunk, being fetched if it is not there; None where it is not wanted yet and no slot is free."""
        key = (span.file.path, span.start, index)
        chunk = self._chunks.get(key)
        if chunk is not None:
            if wanted:
                self._chunks.move_to_end(key)
            return chunk
        slot = self._slot(wanted)
        if slot is None:
            return None
        begin = span.start + index * CHUNK_BYTES
        chunk = self._chunks[key] = _Chunk(slot, min(CHUNK_BYTES, span.stop - begin))
        self._executor.submit(self._fetch, span, key, begin, chunk)
        return chunk

    def _slot(self, wanted: bool) -> int | None:
        if self._free:
            return self._free.pop()
        if self._slots >= self._most:
            for key, chunk in self._chunks.items():
                if not chunk.users and chunk.ready.done():
                    del self._chunks[key]
                    return chunk.slot
            if not wanted:
                return None
        self._slots += 1
        return self._slots - 1

    def _fetch(self, span: Span, key: _Key, begin: int, chunk: _Chunk) -> None:
        try:
            to = chunk.slot * CHUNK_BYTES - begin
            receive(span.file, begin, begin + chunk.nbytes, lambda at, data: self._write(data, to + at), self._stopped)
        except BaseException as error:
            with self._lock:
                del self._chunks[key]
                self._free.append(chunk.slot)
            chunk.ready.set_exception(error)
        else:
            chunk.ready.set_result(None)

    def _make_room(self, nbytes: int, keep: int) -> None:
        """Room for what all jobs read now, once more for the second tensor that they make of it, and ahead.

        Of what they read in turn: for the matrix that they are in, and for the one that follows.
        """
        chunks = 2 * -(-keep // CHUNK_BYTES) + self._jobs * (2 * (1 + -(-nbytes // CHUNK_BYTES)) + _AHEAD)
        if chunks > self._most:
            with self._lock:
                self._most = max(self._most, chunks)

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            room = f"{show(self.folder)}: no room for the ranges of the checkpoint that are being read"
            hint = "free some gigabytes there, or set HF_HUB_CACHE to a folder on a larger disk"
            full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
            other = f"{show(self.folder)}: cannot be written: {error.strerror}"
            raise InputError(room if full else other, hint) from error

    def _copy(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.preadv(self._file.fileno(), [buffer], offset)
            if not count:
                raise InputError(f"{show(self.folder)}: a file was cut while it was used")
            buffer = buffer[count:]
            offset += count


def _scratch_folder() -> Path:
    """Where downloads go, since that is where their user wants gigabytes to lie; else where temporary files go."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
