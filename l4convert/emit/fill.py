"""Fill the weights file: independent jobs write their blocks at planned offsets, a thread that follows digests them.

Where a block goes depends on the plan alone, so any number of jobs may run at once, in any order, on any day, in
threads of this process or on the machines of a cluster.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from l4convert.checkpoint.lazy import Derived
from l4convert.checkpoint.pages import PageBudget
from l4convert.checkpoint.remote import streaming
from l4convert.checkpoint.safetensors_file import Stored
from l4convert.emit.blocks import Blocks, Done, NoRoomError, write_at
from l4convert.emit.follow import Follower
from l4convert.emit.jobs import largest_job, plan_jobs, total_jobs
from l4convert.emit.journal import Journal
from l4convert.emit.manifest import tensor_entry
from l4convert.emit.memory import default_limit, share_memory
from l4convert.emit.plan import WeightsPlan
from l4convert.emit.pool import run_jobs
from l4convert.emit.staging import os_error, reported
from l4convert.progress import NO_PROGRESS, Progress, Task

if TYPE_CHECKING:
    from l4convert.emit.cluster import Cluster

MAX_THREADS = 256  # more would only wait for memory and disk


@dataclass(frozen=True)
class Filling:
    """How to fill.

    Attributes:
        jobs: How many jobs run at once, at most MAX_THREADS in a process; None: one for each core this process may use,
            or of the cluster.
        memory_limit: Bytes that this process, or all those of one machine of the cluster, may hold; None: a quarter of
            the machine's memory.
        restart: Discard what another run left, instead of going on from it.
        cluster: Where the jobs run; None: in this process.
    """

    jobs: int | None = None
    memory_limit: int | None = None
    restart: bool = False
    cluster: Cluster | None = None

    @property
    def threads(self) -> int:
        """How many jobs run at once in this process."""
        return min(self.jobs or len(os.sched_getaffinity(0)), MAX_THREADS)


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
        filling: Threads or cluster, and memory.
        journal: Where finished jobs are recorded; a cluster needs one.

    Raises:
        InputError: The disk is full or fails, a source cannot be read, or a weight is NaN or infinite.
        UsageError: The memory limit is too small for this plan.
        ClusterError: The cluster fails.
    """
    filling = filling or Filling()
    with reported(f"{path.name}: cannot be created"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with progress.task("Writing weights", total=plan.written_bytes, unit="B") as task:
            with reported(f"{path.name}: cannot be written"):
                os.ftruncate(descriptor, plan.total_bytes)  # the gaps between tensors read as zeros
            filler = _Filler(_File(path, descriptor, plan.written_bytes, task), plan, journal)
            if filling.cluster is None:
                tensors, whole = filler.fill(_threads(path, descriptor, plan, journal, filling))
            else:
                assert journal is not None
                run = filling.cluster.runner(path, plan, journal, filling.jobs, filling.memory_limit, task)
                tensors, whole = filler.fill(run, shared=True)
    finally:
        os.close(descriptor)
    entries = {t.name: tensor_entry(t, tensors[t.name]) for t in plan.tensors}
    return Filled({"bytes": plan.total_bytes, "sha256": whole}, entries, filler.resumed_bytes)


# Runs every job, and tells of each one that its bytes are in the file; from any thread.
Runner = Callable[[Callable[[Done], None]], None]


def _threads(path: Path, descriptor: int, plan: WeightsPlan, journal: Journal | None, filling: Filling) -> Runner:
    """Jobs in threads of this process."""
    share = share_memory(filling.memory_limit or default_limit(), largest_job(plan))

    def run(done: Callable[[Done], None]) -> None:
        with (
            contextlib.closing(PageBudget(share.pages)) as pages,
            streaming(filling.threads, _read_again(plan)) as stream,
        ):
            blocks = Blocks(path.name, descriptor, pages)
            recorded: Callable[[int], bytes | None] = journal.digest if journal is not None else lambda _: None
            run_jobs(
                plan_jobs(plan),
                lambda job: done(blocks.do(job, recorded(job.index))),
                filling.threads,
                share.jobs,
                stream.stop,
            )

    return run


def _read_again(plan: WeightsPlan) -> int:
    """Bytes of files on a server that a group reads although another one does, too; the most of any group."""
    groups = [{id(leaf): leaf for planned in group for leaf in _leaves(planned.tensor)} for group in plan.groups]
    uses = Counter(chain.from_iterable(groups))
    sizes = [sum(leaf.nbytes for leaf in group.values()) for group in groups if any(uses[key] > 1 for key in group)]
    return max(sizes, default=0)


def _leaves(tensor: ir.TensorProtocol) -> Iterator[Stored]:
    """The tensors on a server that it is computed from."""
    if isinstance(tensor, Stored) and tensor.remote is not None:
        yield tensor
    elif isinstance(tensor, Derived):
        yield from chain.from_iterable(map(_leaves, tensor.parts))


class _File:
    """The file being filled, and how much is still to come."""

    def __init__(self, path: Path, descriptor: int, total: int, task: Task) -> None:
        self.path = path
        self.descriptor = descriptor
        self._remaining = total
        self._task = task
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._remaining -= nbytes
        self._task.advance(nbytes)

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Explain a full disk."""
        try:
            yield
        except NoRoomError as full:
            free = shutil.disk_usage(self.path.parent).free
            what = f"{full.what}: {self._remaining} bytes are still to be written, {free} are free"
            raise os_error(what, full.error) from full.error


class _Filler:
    """Runs the jobs of a plan on a file."""

    def __init__(self, file: _File, plan: WeightsPlan, journal: Journal | None) -> None:
        self._file = file
        self._plan = plan
        self._journal = journal
        self._follower: Follower | None = None
        self._lock = threading.Lock()
        self.resumed_bytes = 0

    def fill(self, run: Runner, shared: bool = False) -> tuple[dict[str, str], str]:
        """Run all jobs; SHA-256 of every tensor, and of the file.

        Args:
            run: Runs them.
            shared: Whether other machines do.
        """
        with self._file.room():
            write_at(self._file.descriptor, 0, self._plan.header, f"{self._file.path.name}: header")
        self._file.advance(len(self._plan.header))
        with reported(f"{self._file.path.name}: cannot be read back"):
            self._follower = Follower(self._file.path, self._plan, shared)
        try:
            self._follower.start()
            with self._recording(), self._file.room():
                run(self._done)
            with reported(f"{self._file.path.name}: cannot be read back"):
                self._follower.done(total_jobs(self._plan))
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

    def _done(self, done: Done) -> None:
        if done.resumed:
            with self._lock:
                self.resumed_bytes += done.nbytes
        elif self._journal is not None:
            with reported(f"{self._file.path.name}: cannot be written"):
                self._journal.record(done.index, done.digest, done.nbytes)
        self._file.advance(done.nbytes)
        assert self._follower is not None
        with reported(f"{self._file.path.name}: cannot be read back"):
            self._follower.done(done.index)
