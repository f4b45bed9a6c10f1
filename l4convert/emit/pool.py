"""Run jobs in a bounded number of threads and a bounded amount of memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from l4convert.emit.jobs import Job
from l4convert.signals import signals_wait


def _nothing() -> None:
    """Nothing waits for anything but jobs."""


def run_jobs(
    jobs: Iterator[Job],
    run: Callable[[Job], None],
    threads: int,
    memory: int,
    on_stop: Callable[[], None] = _nothing,
) -> None:
    """Run every job once; they begin in order and at most ``threads`` run at a time.

    Args:
        jobs: Made on demand.
        run: Called in a worker thread.
        threads: At least 1.
        memory: What running jobs may together estimate; a job larger than that runs alone.
        on_stop: Called when no job is to begin any more, so that those which wait for something else end soon.

    Raises:
        Exception: The first that ``run`` raised; jobs that had begun are finished first, no other begins.
        KeyboardInterrupt: Likewise.
    """
    pool = _Pool(jobs, run, memory)
    with ThreadPoolExecutor(threads, thread_name_prefix="fill") as executor:
        try:
            with signals_wait():  # in the middle of a start, the executor would not know the thread
                workers = [executor.submit(pool.work) for _ in range(threads)]
            done, _ = wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            pool.stop()
            on_stop()  # not before: the first error is to be the one that is told
        for worker in done:
            worker.result()


class _Pool:
    def __init__(self, jobs: Iterator[Job], run: Callable[[Job], None], memory: int) -> None:
        self._jobs = jobs
        self._run = run
        self._memory = memory
        self._used = 0
        self._stopped = False
        self._turn = threading.Lock()  # one worker at a time waits for memory, so that jobs begin in order
        self._changed = threading.Condition()

    def work(self) -> None:
        try:
            while (job := self._take()) is not None:
                try:
                    self._run(job)
                finally:
                    with self._changed:
                        self._used -= job.memory
                        self._changed.notify_all()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _take(self) -> Job | None:
        with self._turn:
            if self._stopped or (job := next(self._jobs, None)) is None:
                return None
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._fits(job))
                if not self._fits(job):
                    return None
                self._used += job.memory
            return job

    def _fits(self, job: Job) -> bool:
        return not self._used or self._used + job.memory <= self._memory
