"""What the benchmark says about a process is true of processes whose time, memory and reading are known."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.benchmarks.scripts import load

measuring = load("measuring")
MB = 1_000_000


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_time_and_memory_are_the_process_s_own() -> None:
    done = measuring.run(python("import time; block = bytearray(b'x') * 300_000_000; time.sleep(0.3)"))
    assert 0.3 <= done.seconds < 30
    assert 300 * MB <= done.peak_rss < 400 * MB
    assert 300 * MB <= done.peak_anonymous <= done.peak_rss


def test_memory_of_children_is_added() -> None:
    """Two processes that hold 100 MB each, at the same time."""
    child = "import time; block = bytearray(b'x') * 100_000_000; time.sleep(0.5)"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    done = measuring.run(python(f"import subprocess, sys; [child.wait() for child in [{start}, {start}]]"))
    assert 200 * MB <= done.peak_rss < 300 * MB


def test_memory_of_this_process_does_not_count() -> None:
    """The kernel's own count would have it: a new process begins as a copy of the one that starts it."""
    block = bytearray(b"x") * (300 * MB)
    assert measuring.run(["sleep", "0.2"]).peak_rss < 50 * MB
    assert len(block) == 300 * MB


def test_mapped_files_are_resident_but_not_anonymous(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(100 * MB))
    code = (
        "import mmap, time; file = open({path!r}, 'rb'); view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ);"
        "sum(view[i] for i in range(0, len(view), 4096)); time.sleep(0.2)"
    )
    done = measuring.run(python(code.format(path=str(tmp_path / "file"))))
    assert done.peak_rss >= 100 * MB
    assert done.peak_anonymous < 50 * MB


def test_a_command_may_time_itself() -> None:
    done = measuring.run(python("print('noise'); print('{\"seconds\": 12.5, \"parameters\": 7}')"))
    assert done.seconds == 12.5
    assert done.report["parameters"] == 7


@pytest.mark.parametrize("said", ["why\\nbecause\\n", "error: because\\nhint: do not\\n"])
def test_a_failure_says_why(said: str) -> None:
    with pytest.raises(measuring.Unavailable, match=r"ended with 3: (error: )?because$"):
        measuring.run(python(f"import sys; print('{said}', file=sys.stderr); sys.exit(3)"))


@pytest.mark.skipif(shutil.which("fincore") is None, reason="util-linux's fincore is not installed")
def test_files_are_put_into_the_cache_and_out_of_it(tmp_path: Path) -> None:
    """As util-linux counts their pages; looking whether they are gone may fetch the pages that were looked at."""
    path = tmp_path / "file"
    path.write_bytes(bytes(20 * MB))
    measuring.warm([path])
    assert measuring.cached(path) == 1
    assert resident(path) >= 20 * MB
    try:
        measuring.evict([path])
    except measuring.Unavailable as error:
        pytest.skip(str(error))
    assert resident(path) <= MB


def test_a_file_that_stays_in_memory_is_not_called_cold() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no filesystem in memory")
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(bytes(MB))
        file.flush()
        with pytest.raises(measuring.Unavailable, match="stays in memory"):
            measuring.evict([Path(file.name)])


def resident(path: Path) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_more_than_the_memory_is_not_called_warm(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(measuring.available_memory() * 2)
    with pytest.raises(measuring.Unavailable, match="do not fit"):
        measuring.warm([tmp_path / "holes"])
