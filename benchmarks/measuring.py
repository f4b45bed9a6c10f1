"""Run a command and know how long it took, how much memory it held, and whether what it read was in memory before."""

from __future__ import annotations

import json
import os
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
SAMPLES = 64  # places of a file that are looked up in the page cache
INTERVAL = 0.02  # seconds between two looks at the memory of a running command


class Unavailable(Exception):
    """Why something could not be measured, in one line."""


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        seconds: Of the whole process, or what the command says of itself: a last line of JSON with ``seconds``.
        peak_rss: Bytes resident at most, files that are mapped included: ``ru_maxrss``, which the kernel counts, or the
            sum over the command and its children, looked up every 20 ms, if that was more. Never less than this
            process has, some 20 MB: the kernel counts what a process was before it became another program.
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
        Unavailable: It failed; with the last line that it said.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=said, stderr=complained, env={**os.environ, **(environment or {})}
        )
        watch = Watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        rss, anonymous = watch.end()
        if process.returncode:
            raise Unavailable(f"{command[0]} ended with {process.returncode}: {last_line(complained)}")
        report = as_report(last_line(said))
    return Run(report.get("seconds", seconds), max(rss, usage.ru_maxrss * 1024), anonymous, report)


def last_line(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def as_report(line: str) -> dict[str, float]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


class Watch:
    """Looks at the memory of a process and its descendants until told to end."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._peaks = (0, 0)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> tuple[int, int]:
        """The largest sums seen, in bytes: resident, and anonymous."""
        self._done.set()
        self._thread.join()
        return self._peaks

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            sizes = [memory(pid) for pid in family(self._pid)]
            now = (sum(rss for rss, _ in sizes), sum(anonymous for _, anonymous in sizes))
            self._peaks = (max(self._peaks[0], now[0]), max(self._peaks[1], now[1]))


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


def memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process; zeros when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)


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
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only clean pages can go
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    kept = max((cached(path) for path in files), default=0.0)
    if kept > 0.05:
        raise Unavailable(f"{kept:.0%} of the checkpoint stays in memory, so it cannot be read cold")


def cached(path: Path) -> float:
    """Which part of a file the page cache has, from samples: reads that would have to wait are refused."""
    size = path.stat().st_size
    found = 0
    with path.open("rb") as file:
        for place in range(SAMPLES):
            try:
                found += os.preadv(file.fileno(), [bytearray(1)], size * place // SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
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
