"""What a machine of a cluster does: some of the jobs of a run, in a process that lives on between them."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from l4convert import __version__
from l4convert.checkpoint.pages import PageBudget
from l4convert.checkpoint.remote import Streaming
from l4convert.emit.blocks import Blocks, Done, NoRoomError
from l4convert.emit.jobs import largest_job, plan_jobs
from l4convert.emit.journal import work_of
from l4convert.emit.manifest import LIBRARIES
from l4convert.emit.memory import default_limit, share_memory
from l4convert.emit.plan import WeightsPlan
from l4convert.errors import BackendMissing, ClusterError, L4Error


@dataclass(frozen=True)
class Run:
    """A run, as it is told to every machine.

    Attributes:
        name: No other run has it.
        weights: The file to fill.
        journal: The run's journal; read only, to see that it is there.
        work: :func:`~l4convert.emit.journal.work_of` that journal.
        memory_limit: Bytes for all processes of one machine together; None: a quarter of its memory.
    """

    name: str
    weights: Path
    journal: Path
    work: bytes
    memory_limit: int | None


@dataclass(frozen=True)
class Report:
    """What became of some jobs.

    Attributes:
        done: Those whose bytes are in the file, and on the disk.
        error: Why the next one failed.
        cause: The operating system's error behind that.
    """

    done: tuple[Done, ...]
    error: Exception | None = None
    cause: tuple[int | None, str | None] | None = None


def versions() -> dict[str, str]:
    """Version of each distribution on which the bytes may depend."""
    return {"l4convert": __version__} | {name: version(name) for name in LIBRARIES}


def work_on(
    run: bytes, expected: Mapping[str, str], first: int, recorded: Mapping[int, bytes], stop: int,
    plan: Callable[[], bytes], processes: Callable[[], int],
) -> Report:  # fmt: skip
    """Do the jobs from ``first`` to before ``stop``, one after the other.

    Args:
        run: A pickled :class:`Run`; pickled, so that machines of other versions can say that they are.
        expected: What :func:`versions` must say here.
        first: Number of the first job.
        recorded: Digests of those that an earlier run wrote.
        stop: Number of the job after the last.
        plan: Gives the pickled :class:`WeightsPlan`; called once a run.
        processes: Gives how many processes of this machine work at once; likewise.
    """
    done: list[Done] = []
    try:
        _require_versions(expected)
        workplace = _workplace(pickle.loads(run), plan, processes)  # noqa: S301
        for job in plan_jobs(workplace.plan, first, stop):
            done.append(workplace.blocks.do(job, recorded.get(job.index)))  # noqa: PERF401
    except Exception as error:
        return _failed(tuple(done), error)
    return Report(tuple(done))


def _failed(done: tuple[Done, ...], error: Exception) -> Report:
    """The error as something that can travel; a defect too becomes one line."""
    where = socket.gethostname()
    if isinstance(error, NoRoomError):
        return Report(done, error)
    cause = error.__cause__
    system = (cause.errno, cause.strerror) if isinstance(cause, OSError) else None
    if isinstance(error, L4Error):
        return Report(done, type(error)(f"{error.message} (on {where})", error.hint), system)
    return Report(done, RuntimeError(f"{type(error).__name__}: {error} (on {where})"), system)


def _require_versions(expected: Mapping[str, str]) -> None:
    here = versions()
    wrong = [name for name in expected if here.get(name) != expected[name]]
    if wrong:
        found = ", ".join(f"{name} {here.get(name)}" for name in wrong)
        needed = " ".join(f"{name}=={expected[name]}" for name in wrong)
        raise BackendMissing(
            f"{found} cannot work with the versions that started this run", f"on that machine: pip install {needed}"
        )


class _Workplace:
    """The open file and the plan of a run.

    Between a driver that was killed and the end of its tasks, half a minute may pass, in which somebody may discard the
    run and begin another in the same place. So that no byte of the one gets into the other, the file is opened first,
    and then the journal looked at: while that is still the journal of this work, no file of another work exists,
    because whoever discards a run removes its journal, then its file, before there is a new one. From then on the
    file that is open is written, also where another took its name. Late writes of the same work put the same bytes in
    the same place.
    """

    def __init__(self, run: Run, plan: Callable[[], bytes], processes: Callable[[], int]) -> None:
        self.run = run
        # Each write returns when it is on the disk, so the jobs reported may be recorded. And a file system over a
        # network then sends these bytes alone: otherwise Linux may extend a write to the whole pages that it holds
        # (fs/nfs/write.c, nfs_can_extend_write), which at the edge of a block are those of another machine's block.
        flags = os.O_RDWR | getattr(os, "O_DSYNC", os.O_SYNC) | os.O_NOFOLLOW
        with _seen(run):
            self._descriptor = os.open(run.weights, flags)
        try:
            _require_journal(run)
            self.plan: WeightsPlan = pickle.loads(plan())  # noqa: S301
            limit = run.memory_limit or default_limit()
            self._pages = PageBudget(share_memory(limit, largest_job(self.plan), processes()).pages)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._stream = Streaming(1)
        self.blocks = Blocks(run.weights.name, self._descriptor, self._pages)

    def close(self) -> None:
        self._stream.close()
        self._pages.close()
        os.close(self._descriptor)


def _require_journal(run: Run) -> None:
    with _seen(run):
        if work_of(run.journal) != run.work:
            raise OSError(errno.ESTALE, "it holds another run")


@contextlib.contextmanager
def _seen(run: Run) -> Iterator[None]:
    """Explain that the folder of the run is not there, or another one."""
    try:
        yield
    except OSError as error:
        raise ClusterError(
            f"{run.journal.parent}: the folder that is being written is not seen by a machine: {error.strerror}",
            "every machine of the cluster must see the checkpoint and the output under the same paths",
        ) from error


_workplaces: list[_Workplace] = []  # of the last run that this process worked for; at most one


def _workplace(run: Run, plan: Callable[[], bytes], processes: Callable[[], int]) -> _Workplace:
    if _workplaces and _workplaces[0].run == run:
        return _workplaces[0]
    while _workplaces:
        _workplaces.pop().close()
    _workplaces.append(_Workplace(run, plan, processes))
    return _workplaces[0]
