"""Digest the weights file in file order, tensor by tensor, close behind the jobs that fill it.

The bytes are read back (from the page cache, where they just were), hence what is digested is what the file holds.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from pathlib import Path

from l4convert.emit.digest import RegionDigest
from l4convert.emit.jobs import count_jobs, group_jobs
from l4convert.emit.plan import WeightsPlan
from l4convert.signals import signals_wait


class Follower:
    """A thread that digests whatever prefix of the file is complete.

    Args:
        path: The weights file.
        plan: What it will hold.
        shared: Whether other machines write it. A file system over a network promises to show their bytes only to
            who opens the file after they were written, and who read a page before may be shown that one again. So the
            file is opened for every job, and not read ahead.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, plan: WeightsPlan, shared: bool = False) -> None:
        self._plan = plan
        self._path = path
        self._shared = shared
        self._descriptor = os.open(path, os.O_RDONLY)
        self._digest = RegionDigest(self._descriptor)
        self._changed = threading.Condition()
        self._complete = 0  # all jobs below are done
        self._early: set[int] = set()  # done before one that comes earlier
        self._stopped = False
        self._result: Future[tuple[dict[str, str], str]] = Future()
        # A daemon: a signal that interrupts its owner before `stop` must not leave the process waiting for it.
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        with signals_wait():
            self._thread.start()

    def done(self, job: int) -> None:
        """A job's bytes are in the file.

        Raises:
            OSError: The file could not be read back.
        """
        with self._changed:
            self._early.add(job)
            while self._complete in self._early:
                self._early.remove(self._complete)
                self._complete += 1
            self._changed.notify_all()
        if self._result.done():
            self._result.result()

    def result(self) -> tuple[dict[str, str], str]:
        """SHA-256 of every tensor by name, and of the file; waits for the end.

        Raises:
            OSError: The file could not be read back.
        """
        return self._result.result()

    def stop(self) -> None:
        """End the thread, also where jobs are missing, and close the file."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._descriptor)

    def _run(self) -> None:
        try:
            self._result.set_result(self._follow())
        except Exception as error:  # whoever asks for the result gets it
            self._result.set_exception(error)

    def _follow(self) -> tuple[dict[str, str], str]:
        tensors: dict[str, str] = {}
        first = 0
        for group in self._plan.groups:
            for number, planned in enumerate(group):
                self._wait_for(first)  # the header is there when a job is
                self._digest.begin(planned.offset)
                for job in group_jobs(group, first):
                    self._wait_for(job.index)
                    self._digest.extend(job.pieces[number].complete)
                tensors[planned.name] = self._digest.end()
            first += count_jobs(group)
        self._wait_for(first)  # the last "job": everything else is written
        return tensors, self._digest.whole(self._plan.total_bytes)

    def _wait_for(self, job: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._complete > job)
            if self._stopped and self._complete <= job:
                raise InterruptedError("the run was stopped")
        if self._shared:
            self._reopen()

    def _reopen(self) -> None:
        fresh = os.open(self._path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fresh, 0, 0, os.POSIX_FADV_RANDOM)
            os.dup2(fresh, self._descriptor, inheritable=False)
        finally:
            os.close(fresh)
