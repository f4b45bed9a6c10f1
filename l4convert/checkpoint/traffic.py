"""How much was asked of servers in this process."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Counts: bytes of files that were received, requests, and requests that were made again after a failure."""

    nbytes: int = 0
    requests: int = 0
    retries: int = 0

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.nbytes - before.nbytes, self.requests - before.requests, self.retries - before.retries)


class _Counter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Traffic()

    def received(self, nbytes: int) -> None:
        self._add(Traffic(nbytes))

    def requested(self) -> None:
        self._add(Traffic(requests=1))

    def retried(self) -> None:
        self._add(Traffic(retries=1))

    def now(self) -> Traffic:
        return self._now

    def _add(self, more: Traffic) -> None:
        with self._lock:
            now = self._now
            self._now = Traffic(now.nbytes + more.nbytes, now.requests + more.requests, now.retries + more.retries)


TRAFFIC = _Counter()
