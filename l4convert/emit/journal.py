"""The journal of a run: which jobs are on disk, with their digests, so that another run can go on.

A file of lines. The first is JSON, the facts that identify the work; each other one is a job's number and the XXH3 of
its bytes (128 bits, https://xxhash.com; it finds damage, not malice, thirty times as fast as SHA-256, of which the
manifest gets its digests when the file is whole). A line is written only after the weights it speaks of were synced;
many are written together, at most one sync of each file every ``COMMIT_SECONDS``. What follows the last whole line (a
torn one, zeros that a power failure left) is ignored. Room for all lines is reserved at the start, so that a full disk
cannot keep work from being recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from l4convert.signals import signals_wait

SCHEMA = "l4convert.journal/1"
COMMIT_SECONDS = 0.2
COMMIT_BYTES = 256 << 20

_LINE = re.compile(rb"(\d{1,15}) ([0-9a-f]{32})")
_LINE_BYTES = 16 + 32 + 1


def new_digest(data: bytes = b"") -> xxhash.xxh3_128:
    """The digest that the journal keeps of a job's bytes."""
    return xxhash.xxh3_128(data)


@dataclass(frozen=True)
class Recorded:
    """What a journal says.

    Attributes:
        facts: What identifies the work, by name.
        digests: Job -> :func:`new_digest` of its bytes.
        end: Where the next line belongs.
    """

    facts: Mapping[str, Any]
    digests: Mapping[int, bytes] = field(default_factory=dict)
    end: int = 0


def read_journal(path: Path) -> Recorded | None:
    """What the journal at ``path`` says; None where there is none, or no whole first line.

    Raises:
        OSError: It cannot be read.
    """
    try:
        first, *lines = path.read_bytes().split(b"\n")
        content = json.loads(first)
        if content["schema"] != SCHEMA or not isinstance(content["facts"], dict) or not lines:
            return None
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    digests: dict[int, bytes] = {}
    end = len(first) + 1
    for line in lines[:-1]:  # what follows the last newline is torn
        if (match := _LINE.fullmatch(line)) is None:
            break
        digests[int(match[1])] = bytes.fromhex(match[2].decode())
        end += len(line) + 1
    return Recorded(content["facts"], digests, end)


def work_of(path: Path) -> bytes:
    """Digest of a journal's facts: the same for two journals only if every job of both writes the same bytes.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return new_digest(file.readline()).digest()


def changed_facts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the facts that differ, those of ``now`` first and in its order."""
    known = json.loads(json.dumps(now))  # tuples become lists, as they did in the file
    return [name for name in dict.fromkeys([*known, *recorded]) if known.get(name) != recorded.get(name)]


class Journal:
    """An open journal; jobs are recorded from any thread.

    Args:
        path: The file; created, or continued after what is ``recorded``.
        recorded: What it says already, or only the facts for a new one.
        jobs: How many jobs there are.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, recorded: Recorded, jobs: int) -> None:
        self.path = path
        self._digests = dict(recorded.digests)
        self._lock = threading.Condition()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._closing = False
        self._failure: OSError | None = None
        self._committed = len(recorded.digests)
        self._data = -1
        self._thread: threading.Thread | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(self._descriptor, recorded.end)
            self._position = recorded.end
            with contextlib.suppress(OSError):  # not every filesystem can reserve
                os.posix_fallocate(self._descriptor, 0, recorded.end + 4096 + jobs * _LINE_BYTES)
            if not self._position:
                self._append([json.dumps({"schema": SCHEMA, "facts": recorded.facts}).encode() + b"\n"])
            os.fsync(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def committed(self) -> int:
        """How many jobs another run will find."""
        return self._committed

    def digest(self, job: int) -> bytes | None:
        """Digest of a job that an earlier run recorded."""
        return self._digests.get(job)

    def start(self, data: int) -> None:
        """Begin to commit what is recorded; ``data`` is the descriptor of the weights file."""
        self._data = data
        with signals_wait():
            self._thread = threading.Thread(target=self._commit_until_closed, name="journal", daemon=True)
            self._thread.start()

    def record(self, job: int, digest: bytes, nbytes: int) -> None:
        """A job's bytes were written; the line follows when they are safe.

        Raises:
            OSError: An earlier commit failed.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._pending.append(b"%d %s\n" % (job, digest.hex().encode()))
            self._pending_bytes += nbytes
            self._lock.notify_all()

    def stop(self) -> None:
        """Commit the rest; ``data`` may be closed afterwards.

        Raises:
            OSError: A commit failed.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _commit_until_closed(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._pending or self._closing)
                self._lock.wait_for(lambda: self._closing or self._pending_bytes >= COMMIT_BYTES, COMMIT_SECONDS)
                lines, self._pending, self._pending_bytes = self._pending, [], 0
                closing = self._closing
            try:
                if lines:
                    self._commit(lines)
            except OSError as error:
                self._failure = error  # a failed sync may have dropped the bytes, so nothing more is recorded
                return
            if closing:
                return

    def _commit(self, lines: list[bytes]) -> None:
        os.fdatasync(self._data)
        self._append(lines)
        os.fdatasync(self._descriptor)
        self._committed += len(lines)

    def _append(self, lines: list[bytes]) -> None:
        content = memoryview(b"".join(lines))
        while content:
            written = os.pwrite(self._descriptor, content, self._position)
            self._position += written
            content = content[written:]
