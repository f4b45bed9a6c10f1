"""Atomic folders: overwrite rules, locks, killed runs, full disks."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from l4convert.emit import staging, verify_artifact, write_artifact
from l4convert.emit.journal import read_journal
from l4convert.errors import InputError, UsageError
from tests.emit.models import holder, two_layer

ROOT = Path(__file__).parents[2]

# Forks a child for every line it reads, a folder to write (and perhaps -f), so that imports are paid once; says the
# child's process id when it starts and its exit code when it ends.
SLOW_WRITER = """
import os, sys, time
from pathlib import Path
import numpy as np
from l4convert.emit import Filling, journal, write_artifact
from tests.emit.models import Weight, holder

journal.COMMIT_SECONDS = 0.01

class Slow(Weight):
    def tile(self, batch, rows, cols):
        time.sleep(0.016)
        return super().tile(batch, rows, cols)

def write(out, *options):
    tensors = {f"w{i}": Slow(np.full((64, 256), i, np.float32), f"s{i}") for i in range(30)}
    write_artifact(holder(tensors), Path(out), extra_files={"config.json": "{}"}, overwrite="-f" in options,
                   filling=Filling(jobs=2))

while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        try:
            write(*line.split())
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Writer:
    """A process of its own that writes artifacts slowly, to be disturbed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SLOW_WRITER]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, out: Path, *options: str) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join([str(out), *options]) + "\n")
        self.process.stdin.flush()
        return self._number()

    def kill(self, child: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was done before the moment came
            os.kill(child, signal.SIGKILL)

    def wait(self) -> int:
        return self._number()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    started = Writer()
    yield started
    started.process.communicate()


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(writer: Writer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    writer.start(out)
    assert writer.wait() == 0
    return _snapshot(out)


def test_a_killed_run_leaves_only_the_staging_folder_and_the_next_one_succeeds(
    tmp_path: Path, writer: Writer, undisturbed: dict[str, bytes]
) -> None:
    moments = random.Random(5)
    out, midway = tmp_path / "out", 0
    for _ in range(15):
        child = writer.start(out)
        time.sleep(moments.uniform(0, 0.35))
        writer.kill(child)
        writer.wait()
        left = {path.name for path in tmp_path.iterdir()}
        if "out" in left:
            assert _snapshot(out) == undisturbed
            shutil.rmtree(out)
        else:
            assert left <= {".out.partial"}
            midway += (tmp_path / ".out.partial" / "artifact" / "model.safetensors").exists()
    assert midway
    writer.start(out)
    assert writer.wait() == 0
    assert _snapshot(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_overwriting_leaves_an_artifact_whole(
    tmp_path: Path, writer: Writer, undisturbed: dict[str, bytes]
) -> None:
    out = write_artifact(two_layer(), tmp_path / "out")
    old = _snapshot(out)
    moments = random.Random(6)
    for _ in range(6):
        child = writer.start(out, "-f")
        time.sleep(moments.uniform(0, 0.35))
        writer.kill(child)
        writer.wait()
        assert not out.exists() or _snapshot(out) in (old, undisturbed)  # between two renames there is none
    writer.start(out, "-f")
    assert writer.wait() == 0
    assert _snapshot(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_between_the_two_renames_of_an_overwrite_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    out = write_artifact(two_layer(), tmp_path / "out")
    old, new = _snapshot(out), _snapshot(write_artifact(holder({}), tmp_path / "new"))
    process = os.fork()
    if process == 0:  # the child dies in the middle of publishing
        renames = 0
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            real(self, target)
            renames += 1
            if renames == step:
                os._exit(7)
            return target

        monkeypatch.setattr(Path, "rename", rename)
        write_artifact(holder({}), out, overwrite=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert out.exists() == (step == 2)
    with pytest.raises(UsageError, match="exists already"):  # also where the old one was just put back
        write_artifact(two_layer(), out)
    assert _snapshot(out) == (old if step == 1 else new)
    write_artifact(holder({}), out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_a_failing_rename_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_artifact(two_layer(), tmp_path / "out")
    old = _snapshot(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "artifact":
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match="cannot be put in place: Permission denied"):
        write_artifact(holder({}), out, overwrite=True)
    assert _snapshot(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.002)


def test_a_second_process_is_told_who_holds_the_output(tmp_path: Path, writer: Writer) -> None:
    child = writer.start(tmp_path / "out")
    _wait_for(tmp_path / ".out.partial" / "artifact")
    with pytest.raises(UsageError, match=rf"is being written by process {child} on "):
        write_artifact(two_layer(), tmp_path / "out")
    assert writer.wait() == 0  # the first one was not disturbed
    assert verify_artifact(tmp_path / "out").ok


def test_interrupting_keeps_what_is_finished(tmp_path: Path, writer: Writer, undisturbed: dict[str, bytes]) -> None:
    child = writer.start(tmp_path / "out")
    _wait_for(tmp_path / ".out.partial" / "artifact" / "model.safetensors")
    time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    assert writer.wait() == 130
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    recorded = read_journal(tmp_path / ".out.partial" / "journal")
    assert recorded is not None
    assert 0 < len(recorded.digests) < 30
    writer.start(tmp_path / "out")
    assert writer.wait() == 0
    assert _snapshot(tmp_path / "out") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_existing_output_is_kept(tmp_path: Path) -> None:
    out = write_artifact(two_layer(), tmp_path / "out")
    before = _snapshot(out)
    with pytest.raises(UsageError, match="exists already") as caught:
        write_artifact(holder({}), out)
    assert "--overwrite" in (caught.value.hint or "")
    assert _snapshot(out) == before


def test_overwrite_replaces_an_artifact_whole(tmp_path: Path) -> None:
    out = write_artifact(two_layer(), tmp_path / "out", extra_files={"stale.txt": "x"})
    (out / "engines").mkdir()
    write_artifact(holder({}), out, overwrite=True)
    assert set(_snapshot(out)) == {"model.onnx", "model.safetensors", "l4convert.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_an_empty_folder_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write_artifact(holder({}), tmp_path / "link", overwrite=True) == tmp_path / "real"
    assert (tmp_path / "link").is_symlink()
    assert verify_artifact(tmp_path / "link").ok


def test_overwrite_never_replaces_anything_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("text")
    for name, message in (("photos", "something else than an l4convert artifact"), ("file", "is a file")):
        with pytest.raises(UsageError, match=message):
            write_artifact(holder({}), tmp_path / name, overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    assert (tmp_path / "file").read_text() == "text"


def test_missing_parents_are_made_and_files_in_the_way_are_named(tmp_path: Path) -> None:
    assert write_artifact(holder({}), tmp_path / "a" / "b" / "out").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, UsageError), match="file"):
        write_artifact(holder({}), tmp_path / "file" / "out")


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine" / "artifact").mkdir(parents=True)
    (tmp_path / ".out.partial").symlink_to("mine")
    with pytest.raises(UsageError, match="symbolic link"):
        write_artifact(holder({}), tmp_path / "out")
    assert (tmp_path / "mine" / "artifact").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot be created: Permission denied"):
        write_artifact(holder({}), tmp_path / "locked" / "out")


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real = Path.rename
    monkeypatch.setattr(staging, "sync", lambda path: events.append(path.name))

    def rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    write_artifact(two_layer(), tmp_path / "out")
    assert events == ["l4convert.json", "model.onnx", "model.safetensors", "artifact", "rename", tmp_path.name]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="bytes are needed"):
        write_artifact(two_layer(1024), tiny_disk / "out")
    # What is free when the run starts, another process may take meanwhile.
    monkeypatch.setattr("l4convert.emit.write.check_free_disk", lambda folder, needed: None)
    with pytest.raises(InputError, match=r"bytes are still to be written, \d+ are free: No space left on device"):
        write_artifact(two_layer(1024), tiny_disk / "out")
    assert list(tiny_disk.iterdir()) == []  # not one block was finished, so there is nothing to keep
    with pytest.raises(UsageError, match="is a mount point"):
        write_artifact(two_layer(), tiny_disk, overwrite=True)
    assert write_artifact(two_layer(), tiny_disk / "out").is_dir()


def test_a_parent_in_which_no_folder_can_be_made_is_an_input_error() -> None:
    """/proc answers mkdir with ENOENT, which must not be taken for a race with another process."""
    with pytest.raises(InputError, match="cannot be created"), staging.staged(Path("/proc/out"), overwrite=False):
        pass
