"""Run a command and know how long it took, how much memory it held, and whether what it read was in memory before."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK = 4 << 20
_EVICTIONS = 5
SAMPLES = 32  # places of a file that are looked up in the page cache
INTERVAL = 0.02  # seconds between two looks at the memory of a running command


class Unavailable(Exception):
    """Why something could not be measured, in one line."""


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: Of the whole process, or what the command says of itself: a last line of JSON with ``seconds``.
        peak_rss: Bytes resident at most, files that are mapped included; see :func:`largest`.
        peak_anonymous: Bytes of it that are no file's, as looked up.
        report: That last line, if it was JSON.
    """

    seconds: float
    peak_rss: int
    peak_anonymous: int
    report: dict[str, float]


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end.

    Raises:
        Unavailable: It failed; with the error that it ended with.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=said, stderr=complained, env={**os.environ, **(environment or {})}
        )
        watch = Watch(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:  # Ctrl-C: nothing is left running
            process.kill()
            process.wait()
            raise
        finally:
            peaks = watch.end()
        if process.returncode:
            lines = last_lines(complained)
            worst = next((line for line in reversed(lines) if line.startswith("error")), lines[-1])
            raise Unavailable(f"{Path(command[0]).name} ended with {process.returncode}: {worst}")
        report = as_report(last_lines(said)[-1])
    return Run(report.get("seconds", seconds), largest(peaks, usage.ru_maxrss * 1024), peaks.anonymous, report)


def last_lines(file: IO[bytes]) -> list[str]:
    """What a file of text ends with; at least one line."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()] or ["(nothing)"]


def as_report(line: str) -> dict[str, float]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Memory:
    """Bytes of a process, or the most of each that was seen.

    Attributes:
        resident: In memory now, of the process and its descendants together.
        peak: The most that the process itself had until now (``VmHWM``).
        anonymous: Of ``resident``, what is no file's.
    """

    resident: int = 0
    peak: int = 0
    anonymous: int = 0

    def most(self, other: Memory) -> Memory:
        return Memory(
            max(self.resident, other.resident), max(self.peak, other.peak), max(self.anonymous, other.anonymous)
        )


def largest(seen: Memory, counted: int) -> int:
    """The peak of resident bytes, from what was looked up every 20 ms and what the kernel counted (``ru_maxrss``).

    The kernel's count is exact, but includes what a new process was before it ran its own program, a copy of this one.
    So it is believed only where it is above anything that this process had.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(seen.resident, seen.peak, counted if counted > own else 0)


class Watch:
    """Looks at the memory of a process and its descendants until told to end."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._most = Memory()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> Memory:
        """The most of each that was seen."""
        self._done.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            each = [memory(pid) for pid in family(self._pid)]
            together = Memory(sum(one.resident for one in each), each[0].peak, sum(one.anonymous for one in each))
            self._most = self._most.most(together)


def family(pid: int) -> list[int]:
    """A process and all its descendants; those that have ended are left out."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def memory(pid: int) -> Memory:
    """Of one process; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return Memory()
    parts = [line.split() for line in lines if line.endswith(" kB")]
    sizes = {key: int(number) * 1024 for key, number, _ in parts}
    return Memory(sizes.get("VmRSS:", 0), sizes.get("VmHWM:", 0), sizes.get("RssAnon:", 0))


def warm(files: Sequence[Path]) -> None:
    """Read the files, so that the page cache has them.

    Raises:
        Unavailable: There is less memory than that.
    """
    needed, there = sum(size_of(path) for path in files), available_memory()
    if needed > there:
        raise Unavailable(f"{needed / 1e9:.1f} GB do not fit into the {there / 1e9:.1f} GB of memory that are free")
    for path in files:
        with path.open("rb", buffering=0) as file:
            buffer = bytearray(BLOCK)
            while file.readinto(buffer):
                pass


def available_memory() -> int:
    """Bytes that the system could give, the page cache's included."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def evict(files: Sequence[Path]) -> None:
    """Make the page cache forget the files; needs no privileges, and leaves all other files alone.

    Raises:
        Unavailable: They are still there: a filesystem in memory, or one that ignores the advice.
    """
    kept = 0.0
    for _ in range(_EVICTIONS):  # pages that are in use for a moment stay
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())  # only clean pages can go
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kept = max((cached(path) for path in files), default=0.0)
        if kept <= 0.1:
            return
        time.sleep(0.5)
    if files:
        raise Unavailable(f"{kept:.0%} of the checkpoint stays in memory, so it cannot be read cold")


def cached(path: Path) -> float:
    """Which part of a file the page cache has, from samples: reads that would have to wait are refused.

    A refused read may still fetch its page, hence the advice against reading ahead, and few samples. Filesystems that
    know no such reads count as in memory; tmpfs is one.
    """
    size = path.stat().st_size
    found = 0
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in range(SAMPLES):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], size * place // SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                return 1.0
    return found / SAMPLES if size else 0.0


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
