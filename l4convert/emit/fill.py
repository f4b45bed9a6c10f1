"""Fill the weights file: independent jobs write their blocks at planned offsets, a thread that follows digests them.

Where a block goes depends on the plan alone, so any number of jobs may run at once, in any order, on any day.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.pages import PageBudget
from l4convert.emit.digest import BLOCK_BYTES
from l4convert.emit.follow import Follower
from l4convert.emit.jobs import Job, Piece, count_jobs, group_jobs, plan_jobs
from l4convert.emit.journal import Journal, new_digest
from l4convert.emit.memory import default_limit, share_memory
from l4convert.emit.plan import PlannedTensor, WeightsPlan
from l4convert.emit.pool import run_jobs
from l4convert.emit.staging import os_error, reported
from l4convert.errors import InputError
from l4convert.progress import NO_PROGRESS, Progress, Task

# Storage type of each float type, and the smallest bit pattern, sign cleared, that is NaN or infinite: that with all
# exponent bits set (IEEE 754, and "OCP 8-bit Floating Point Specification" for E5M2). E4M3FN has no infinity, one NaN.
_NOT_FINITE: dict[ir.DataType, tuple[str, int]] = {
    ir.DataType.FLOAT: ("<u4", 0x7F80_0000),
    ir.DataType.DOUBLE: ("<u8", 0x7FF0_0000_0000_0000),
    ir.DataType.FLOAT16: ("<u2", 0x7C00),
    ir.DataType.BFLOAT16: ("<u2", 0x7F80),
    ir.DataType.FLOAT8E4M3FN: ("u1", 0x7F),
    ir.DataType.FLOAT8E5M2: ("u1", 0x7C),
}
# Looked at together, so that temporaries stay in a core's cache.
_CACHED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Filling:
    """How to fill.

    Attributes:
        jobs: How many jobs run at once; None: one for each core this process may use.
        memory_limit: Bytes that this process may hold; None: a quarter of the machine's memory.
        restart: Discard what another run left, instead of going on from it.
    """

    jobs: int | None = None
    memory_limit: int | None = None
    restart: bool = False

    @property
    def threads(self) -> int:
        """How many jobs run at once."""
        return self.jobs or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Filled:
    """What was written.

    Attributes:
        file: The weights file's entry in the manifest.
        tensors: The entries of its tensors by name.
        resumed_bytes: How many bytes an earlier run had written.
    """

    file: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    resumed_bytes: int


def write_weights(
    path: Path,
    plan: WeightsPlan,
    progress: Progress = NO_PROGRESS,
    filling: Filling | None = None,
    journal: Journal | None = None,
) -> Filled:
    """Write the weights file as planned, in bounded memory; the bytes do not depend on ``filling``.

    Args:
        path: The file; made, or continued where ``journal`` knows of finished jobs.
        plan: What goes into it.
        progress: Told of every byte, also of those that an earlier run wrote, when they are found right.
        filling: Threads and memory.
        journal: Where finished jobs are recorded.

    Raises:
        InputError: The disk is full or fails, a source cannot be read, or a weight is NaN or infinite.
        UsageError: The memory limit is too small for this plan.
    """
    filling = filling or Filling()
    largest = max((next(group_jobs(group, 0)).memory for group in plan.groups), default=0)
    share = share_memory(filling.memory_limit or default_limit(), largest)
    with reported(f"{path.name}: cannot be created"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with progress.task("Writing weights", total=plan.written_bytes, unit="B") as task:
            with reported(f"{path.name}: cannot be written"):
                os.ftruncate(descriptor, plan.total_bytes)  # the gaps between tensors read as zeros
            file = _File(path, descriptor, plan.written_bytes, task)
            with contextlib.closing(PageBudget(share.pages)) as pages:
                filler = _Filler(file, plan, journal, pages)
                tensors, whole = filler.fill(filling.threads, share.jobs)
    finally:
        os.close(descriptor)
    entries = {t.name: _entry(t, tensors[t.name]) for t in plan.tensors}
    return Filled({"bytes": plan.total_bytes, "sha256": whole}, entries, filler.resumed_bytes)


def check_finite(tensor: ir.TensorProtocol) -> None:
    """Refuse a small weight from a checkpoint that is not finite; constants of the graph itself may be infinite.

    Raises:
        InputError: Names the tensor and how many of its values are NaN or infinite.
    """
    if _is_weight(tensor):
        raise_unless_finite(tensor, count_not_finite(tensor.tobytes(), tensor.dtype), tensor.size)


def count_not_finite(data: bytes | memoryview, dtype: ir.DataType) -> int:
    """How many values among little-endian ``data`` are NaN or infinite; 0 for types that have neither."""
    if dtype not in _NOT_FINITE:
        return 0
    storage, smallest = _NOT_FINITE[dtype]
    bits = np.frombuffer(data, storage)
    magnitude = np.iinfo(bits.dtype).max >> 1
    count = 0
    for start in range(0, bits.size, _CACHED_ELEMENTS):
        block = bits[start : start + _CACHED_ELEMENTS] & magnitude
        if block.max() >= smallest:
            count += int(np.count_nonzero(block >= smallest))
    return count


class _File:
    """The file being filled: reads and writes at offsets, and knows how much is still to come."""

    def __init__(self, path: Path, descriptor: int, total: int, task: Task) -> None:
        self.path = path
        self.descriptor = descriptor
        self._remaining = total
        self._task = task
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes | memoryview, what: str) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self.descriptor, view, offset)
                offset += written
                view = view[written:]
        except OSError as error:
            raise self._error(what, error) from error

    def digest(self, pieces: tuple[Piece, ...]) -> bytes:
        """Digest of the pieces' bytes as the file holds them; empty where it ends before them."""
        digest = new_digest()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for piece in pieces:
            position, stop = piece.offset, piece.offset + piece.nbytes
            while position < stop:
                count = os.preadv(self.descriptor, [buffer[: min(BLOCK_BYTES, stop - position)]], position)
                if not count:
                    return b""
                digest.update(buffer[:count])
                position += count
        return digest.digest()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._remaining -= nbytes
        self._task.advance(nbytes)

    def _error(self, what: str, error: OSError) -> InputError:
        label = f"{self.path.name}: {what}"
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return os_error(f"{label}: cannot be written", error)
        free = shutil.disk_usage(self.path.parent).free
        return os_error(f"{label}: {self._remaining} bytes are still to be written, {free} are free", error)


class _Filler:
    """Runs the jobs of a plan on a file."""

    def __init__(self, file: _File, plan: WeightsPlan, journal: Journal | None, pages: PageBudget) -> None:
        self._file = file
        self._plan = plan
        self._journal = journal
        self._pages = pages
        self._follower: Follower | None = None
        self._lock = threading.Lock()
        self.resumed_bytes = 0

    def fill(self, threads: int, memory: int) -> tuple[dict[str, str], str]:
        """Run all jobs; SHA-256 of every tensor, and of the file."""
        self._file.write(0, self._plan.header, "header")
        self._file.advance(len(self._plan.header))
        self._follower = Follower(self._file.descriptor, self._plan)
        try:
            self._follower.start()
            with self._recording():
                run_jobs(plan_jobs(self._plan), self._run, threads, memory)
            with reported(f"{self._file.path.name}: cannot be read back"):
                self._follower.done(sum(map(count_jobs, self._plan.groups)))
                return self._follower.result()
        finally:
            self._follower.stop()

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Let the journal commit while the context lasts, and what is done also when it fails."""
        if self._journal is None:
            yield
            return
        try:
            self._journal.start(self._file.descriptor)
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._journal.stop()
            raise
        with reported(f"{self._file.path.name}: cannot be written"):
            self._journal.stop()

    def _run(self, job: Job) -> None:
        if self._is_written(job):
            with self._lock:
                self.resumed_bytes += job.nbytes
        else:
            digest = self._write(job)
            if self._journal is not None:
                with reported(f"{self._file.path.name}: cannot be written"):
                    self._journal.record(job.index, digest, job.nbytes)
        self._file.advance(job.nbytes)
        assert self._follower is not None
        with reported(f"{self._file.path.name}: cannot be read back"):
            self._follower.done(job.index)

    def _is_written(self, job: Job) -> bool:
        """Whether an earlier run wrote the job's bytes and they are still what it wrote."""
        recorded = None if self._journal is None else self._journal.digest(job.index)
        if recorded is None:
            return False
        with contextlib.suppress(OSError):  # a block that cannot be read is written again
            return self._file.digest(job.pieces) == recorded
        return False

    def _write(self, job: Job) -> bytes:
        digest = new_digest()
        for piece in job.pieces:
            name = piece.planned.name
            with reported(f"tensor {name!r}: its source cannot be read"), self._pages.job():
                data = piece.compute()
            if len(data) != piece.nbytes:
                raise RuntimeError(f"{name}: computed {len(data)} bytes, not {piece.nbytes}, for row {piece.start}")
            _check_piece(piece, data)
            digest.update(data)
            self._file.write(piece.offset, data, f"tensor {name!r}")
        return digest.digest()


def _check_piece(piece: Piece, data: bytes | memoryview) -> None:
    tensor = piece.planned.tensor
    if _is_weight(tensor) and (count := count_not_finite(data, tensor.dtype)):
        raise_unless_finite(tensor, count, len(data) * 8 // tensor.dtype.bitwidth)


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, LazyTensor) and bool(tensor.sources)


def raise_unless_finite(tensor: ir.TensorProtocol, count: int, among: int) -> None:
    """Refuse a weight of which ``count`` values, of ``among`` that were looked at, are NaN or infinite.

    Raises:
        InputError: ``count`` is not 0; names the tensor.
    """
    if count and isinstance(tensor, LazyTensor):
        part = "" if among == tensor.size else " (in one block of it)"
        raise InputError(
            f"{tensor.origin}: {count} of the {among} values written from it{part} are NaN or infinite",
            hint="the checkpoint is damaged or was trained into overflow; no conversion of it can be right",
        )


def _entry(planned: PlannedTensor, sha256: str) -> dict[str, Any]:
    dtype = planned.tensor.dtype.name
    return {"dtype": dtype, "shape": list(planned.shape), "nbytes": planned.nbytes, "sha256": sha256}
