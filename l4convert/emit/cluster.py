"""Run jobs on the machines of a Ray cluster that share a file system with this one.

This process plans, keeps the journal, digests the file and publishes it, as it does alone; only computing the bytes of
jobs and writing them is done elsewhere, by Ray tasks of consecutive jobs. Which machine does what, what happens when
one is lost, and how machines join, is Ray's: nothing here schedules.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from l4convert.emit.blocks import Done
from l4convert.emit.jobs import total_jobs
from l4convert.emit.journal import Journal, work_of
from l4convert.emit.node import Report, Run, versions
from l4convert.emit.plan import WeightsPlan
from l4convert.errors import BackendMissing, ClusterError, backend_missing
from l4convert.progress import Task

# Half a second to two of work; fewer towards the end, so that all machines end at about the same time.
MOST_JOBS = 32
# How often a task may be lost with its machine, before the task is thought to be the reason.
RETRIES = 10
_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 2.0
_HINT = "check the address, and that `ray start --head` runs there; Ray's own port for clients is 10001"


@contextlib.contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A connection to a cluster while the context lasts.

    Args:
        address: What ``ray.init`` takes: ray://HOST:PORT, HOST:PORT from a machine of the cluster, or auto.

    Raises:
        BackendMissing: Ray, or what its client needs, is not installed.
        ClusterError: Nobody, or no cluster of this Ray and Python, answers.
    """
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # or Ray, when a connection is lost, starts another cluster
    try:
        ray = import_module("ray")
    except ModuleNotFoundError as error:
        raise backend_missing("ray") from error
    _require_listener(address)
    news = logging.getLogger("ray")  # what matters comes as an exception, too
    news.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except ImportError as error:  # ray without what its client needs
        raise backend_missing("ray") from error
    except ConnectionAbortedError as error:  # https://github.com/ray-project/ray/issues/63202
        hint = "try again; if it was a crash, start the head with GRPC_ENABLE_FORK_SUPPORT=0 in its environment"
        raise ClusterError(f"{address}: the cluster gave no connection: {_one_line(error)}", hint) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"{address}: no cluster can be used there: {_one_line(error)}", _HINT) from error
    news.setLevel(logging.CRITICAL + 1)  # Ray has set it
    try:
        yield Cluster(address, ray)
    finally:
        with contextlib.suppress(Exception):  # the connection may be what failed
            ray.shutdown()


class Cluster:
    """A cluster that is connected to; made by :func:`connected`."""

    def __init__(self, address: str, ray: Any) -> None:
        self._address = address
        self._ray = ray
        self._looked = 0.0
        self._cpus = 0
        self.machines: set[str] = set()  # that did any job

    def runner(
        self, path: Path, plan: WeightsPlan, journal: Journal, most: int | None, memory_limit: int | None, task: Task
    ) -> Callable[[Callable[[Done], None]], None]:
        """Does all jobs of a plan when it is called.

        Args:
            path: The weights file, on storage that every machine sees under this path.
            plan: What goes into it.
            journal: The run's, likewise.
            most: How many tasks run at once; None: as many as the cluster has CPUs.
            memory_limit: Bytes on each machine; None: a quarter of its memory.
            task: Told how many machines there are.
        """
        run = Run(uuid.uuid4().hex, path, journal.path, work_of(journal.path), memory_limit)

        def do(done: Callable[[Done], None]) -> None:
            try:
                with contextlib.closing(_Tasks(self._ray, run, plan, journal)) as tasks:
                    self._run(tasks, total_jobs(plan), most, task, done)
            except ConnectionError as error:
                raise ClusterError(f"{self._address}: the connection is lost: {_one_line(error)}", _HINT) from error
            except self._ray.exceptions.RayError as error:
                raise ClusterError(f"{self._address}: {_one_line(error)}", "look into Ray's logs") from error

        return do

    def _run(self, tasks: _Tasks, total: int, most: int | None, task: Task, done: Callable[[Done], None]) -> None:
        begun = 0
        failed: Report | None = None  # the others that ended are recorded first
        while begun < total or tasks.running:
            cpus = self._look(task)
            at_once = most or max(1, 2 * cpus)  # one waits while one runs, so that no machine waits for this one
            while begun < total and len(tasks.running) < at_once:
                stop = begun + max(1, min(MOST_JOBS, (total - begun) // (2 * at_once)))
                tasks.begin(begun, stop)
                begun = stop
            for machine, report in tasks.finished():
                self.machines.add(machine)
                for one in report.done:
                    done(one)
                failed = failed or (report if report.error else None)
            if failed is not None and failed.error is not None:
                raise failed.error from (OSError(*failed.cause) if failed.cause else None)

    def _look(self, task: Task) -> int:
        """CPUs of the cluster, now or shortly before."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            alive = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self._cpus = sum(int(node["Resources"]["CPU"]) for node in alive)
            count = len(alive)
            task.update(f"Writing on {count} machine{'s' * (count != 1)}" if count else "Waiting for a machine")
        return self._cpus


class _Tasks:
    """Ray tasks of consecutive jobs."""

    def __init__(self, ray: Any, run: Run, plan: WeightsPlan, journal: Journal) -> None:
        self._ray = ray
        self._journal = journal
        groups = tuple(tuple(replace(planned, values=()) for planned in group) for group in plan.groups)
        self._plan = ray.put(pickle.dumps(WeightsPlan(b"", groups, plan.total_bytes)))
        self._run = pickle.dumps(run)
        self._versions = versions()
        self._remote = ray.remote(_task()).options(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")
        self.running: list[Any] = []

    def begin(self, first: int, stop: int) -> None:
        """Let some machine do the jobs from ``first`` to before ``stop``."""
        recorded = {job: digest for job in range(first, stop) if (digest := self._journal.digest(job)) is not None}
        # In a list, or Ray would fetch the plan and unpack it for every task.
        self.running.append(self._remote.remote(self._run, self._versions, first, recorded, stop, [self._plan]))

    def finished(self) -> Iterator[tuple[str, Report]]:
        """The machine and the report of every task that has ended; waits up to a second for one."""
        ready, _ = self._ray.wait(self.running, num_returns=1, timeout=1)
        if not ready:
            return
        ready, self.running = self._ray.wait(self.running, num_returns=len(self.running), timeout=0)
        for machine, host, report in self._ray.get(ready):
            if isinstance(report, str):
                needed = f"pip install l4convert=={self._versions['l4convert']}"
                raise BackendMissing(f"l4convert cannot be imported on {host}: {report}", f"on that machine: {needed}")
            yield machine, pickle.loads(report)  # noqa: S301

    def close(self) -> None:
        """End those that still run."""
        for reference in self.running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)


def _task() -> Callable[..., tuple[str, str, bytes | str]]:
    """What runs on a machine: its id, its name, and a pickled :class:`Report`, or why there can be none."""

    # A function inside a function travels as code, so also a machine without this package can answer.
    def task(
        run: bytes, expected: Mapping[str, str], first: int, recorded: Mapping[int, bytes], stop: int, plan: list[Any]
    ) -> tuple[str, str, bytes | str]:
        import pickle
        import socket
        from importlib import import_module

        ray = import_module("ray")
        node = ray.get_runtime_context().get_node_id()

        def processes() -> int:
            here = [one for one in ray.nodes() if one["NodeID"] == node]
            return max(1, int(sum(one["Resources"].get("CPU", 0) for one in here)))

        try:
            from l4convert.emit.node import work_on
        except ImportError as error:
            return node, socket.gethostname(), str(error)
        report = work_on(run, expected, first, recorded, stop, lambda: ray.get(plan[0]), processes)
        return node, socket.gethostname(), pickle.dumps(report)

    return task


def _require_listener(address: str) -> None:
    """Refuse quickly where nobody answers, for which Ray takes half a minute to two."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d{1,5})", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"{address}: no cluster can be reached there: {_one_line(error)}", _HINT) from error


def _one_line(error: BaseException) -> str:
    """What happened, and where it comes with a traceback, why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
