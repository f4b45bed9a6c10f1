"""Continuing an unfinished run: identical bytes, nothing trusted, other work refused; threads and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from l4convert.emit import Filling, write_artifact
from l4convert.emit.journal import read_journal
from l4convert.emit.memory import parse_size
from l4convert.errors import InputError, UsageError
from tests.emit.models import Weight, holder

ROOT = Path(__file__).parents[2]
NBYTES = 4 * 64 * 256


class Failing(Weight):
    """A weight whose reading can be made to fail."""

    broken = False

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        if Failing.broken and self.source == "s6":
            raise OSError(5, "Input/output error")
        return super().tile(batch, rows, cols)


def _write(out: Path, sources: tuple[Path, ...] = (), recipe: str = "a", restart: bool = False, jobs: int = 1) -> int:
    """Write ten tensors of one job each; bytes resumed."""
    rng = np.random.default_rng(3)
    tensors = {f"w{i}": Failing(rng.standard_normal((64, 256)).astype(np.float32), f"s{i}") for i in range(10)}
    resumed: list[int] = []
    write_artifact(
        holder(dict(tensors)),
        out,
        manifest={"recipe": recipe},
        sources=sources,
        filling=Filling(jobs=jobs, restart=restart),
        on_resumed=resumed.append,
    )
    return sum(resumed)


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The staging folder of a run that failed after six of ten jobs; the source is readable again."""
    monkeypatch.setattr(Failing, "broken", True)
    with pytest.raises(InputError, match="tensor 'w6': its source cannot be read") as caught:
        _write(tmp_path / "out")
    assert "run the same command again" in (caught.value.hint or "")
    monkeypatch.setattr(Failing, "broken", False)
    return tmp_path / ".out.partial"


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _undisturbed(tmp_path: Path) -> dict[str, bytes]:
    assert _write(tmp_path / "undisturbed") == 0
    return _snapshot(tmp_path / "undisturbed")


def test_finished_jobs_are_not_done_again(unfinished: Path, tmp_path: Path) -> None:
    assert _write(tmp_path / "out") == 6 * NBYTES
    assert _snapshot(tmp_path / "out") == _undisturbed(tmp_path)
    assert not unfinished.exists()


def test_a_block_that_was_changed_is_done_again(unfinished: Path, tmp_path: Path) -> None:
    weights = unfinished / "artifact" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[4096 + NBYTES + 77] ^= 1
    weights.write_bytes(content)
    assert _write(tmp_path / "out") == 5 * NBYTES
    assert _snapshot(tmp_path / "out") == _undisturbed(tmp_path)


def test_weights_that_were_cut_or_lost_are_done_again(unfinished: Path, tmp_path: Path) -> None:
    os.truncate(unfinished / "artifact" / "model.safetensors", 4096 + 2 * NBYTES + 5)
    assert _write(tmp_path / "out") == 2 * NBYTES
    assert _snapshot(tmp_path / "out") == _undisturbed(tmp_path)


def _lines(journal: Path) -> list[bytes]:
    """The whole lines, without the room that is reserved after them."""
    return [line + b"\n" for line in journal.read_bytes().rstrip(b"\0").splitlines()]


DAMAGE: dict[str, tuple[Callable[[list[bytes]], bytes], int]] = {
    "torn line": (lambda lines: b"".join(lines[:5]) + lines[5][:20], 4),
    "no newline": (lambda lines: b"".join(lines)[:-1], 5),
    "zeros": (lambda lines: b"".join(lines[:3]) + bytes(300), 2),
    "zeros in the middle": (lambda lines: b"".join(lines[:3]) + bytes(67) + b"".join(lines[4:]), 2),
    "first line torn": (lambda lines: lines[0][:30], 0),
    "empty": (lambda lines: b"", 0),
    "another job's digest": (lambda lines: b"".join([*lines, lines[1].replace(b"0 ", b"3 ", 1)]), 5),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_costs_work_but_no_correctness(unfinished: Path, tmp_path: Path, damage: str) -> None:
    change, kept = DAMAGE[damage]
    journal = unfinished / "journal"
    lines = _lines(journal)
    assert len(lines) == 7
    journal.write_bytes(change(lines))
    assert _write(tmp_path / "out") == kept * NBYTES
    assert _snapshot(tmp_path / "out") == _undisturbed(tmp_path)


def test_other_options_are_refused_until_told_to_restart(unfinished: Path, tmp_path: Path) -> None:
    before = _snapshot(unfinished / "artifact")
    with pytest.raises(UsageError, match=r"cannot be continued; changed: recipe$") as caught:
        _write(tmp_path / "out", recipe="b")
    assert "--restart" in (caught.value.hint or "")
    assert _snapshot(unfinished / "artifact") == before
    assert read_journal(unfinished / "journal") is not None
    assert _write(tmp_path / "out", recipe="b", restart=True) == 0
    assert json.loads((tmp_path / "out" / "l4convert.json").read_text())["recipe"] == "b"
    assert not unfinished.exists()


def test_a_changed_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "model-00001.safetensors"
    shard.write_bytes(b"x")
    monkeypatch.setattr(Failing, "broken", True)
    with pytest.raises(InputError):
        _write(tmp_path / "out", (shard,))
    monkeypatch.setattr(Failing, "broken", False)
    time = shard.stat().st_mtime_ns
    os.utime(shard, ns=(time, time + 1))
    with pytest.raises(InputError, match=r"changed: source file model-00001\.safetensors$"):
        _write(tmp_path / "out", (shard,))
    os.utime(shard, ns=(time, time))
    assert _write(tmp_path / "out", (shard,)) == 6 * NBYTES


def test_any_number_of_jobs_gives_the_same_bytes(tmp_path: Path) -> None:
    for jobs in (1, 4):
        _write(tmp_path / str(jobs), jobs=jobs)
    assert _snapshot(tmp_path / "1") == _snapshot(tmp_path / "4")


def test_jobs_run_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)

    class Meeting(Weight):
        def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
            barrier.wait(timeout=20)  # broken unless three tiles are computed together
            return super().tile(batch, rows, cols)

    tensors = {f"w{i}": Meeting(np.ones((64, 64), np.float32), f"s{i}") for i in range(6)}
    assert write_artifact(holder(dict(tensors)), tmp_path / "out", filling=Filling(jobs=3)).is_dir()


def test_a_memory_limit_that_is_too_small_names_the_least(tmp_path: Path) -> None:
    model = holder({"w": Weight(np.zeros((256, 256), np.float32))})
    with pytest.raises(UsageError, match=r"limit of 10M is too small for this model: the least is \d+M") as caught:
        write_artifact(model, tmp_path / "out", filling=Filling(memory_limit=parse_size("10M")))
    assert list(tmp_path.iterdir()) == []
    least = str(caught.value.hint).split()[2]
    assert write_artifact(
        model, tmp_path / "out", filling=Filling(memory_limit=parse_size(least) + (64 << 20))
    ).is_dir()


@pytest.mark.parametrize(("text", "size"), [("4G", 4 << 30), ("512m", 512 << 20), ("1.5 GiB", 3 << 29), ("900", 900)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4X", "-1G", "0", "G", "9" * 400 + "G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not an amount of memory"):
        parse_size(text)


def test_a_full_disk_then_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        (disk / "other").write_bytes(bytes(500_000))
        with pytest.raises(InputError, match="too few"):
            _write(disk / "out")
        # What is free when the run starts, another process may take meanwhile.
        with monkeypatch.context() as patch:
            patch.setattr("l4convert.emit.write.check_free_disk", lambda folder, needed: None)
            with pytest.raises(InputError, match=r"\d+ bytes are still to be written, \d+ are free") as caught:
                _write(disk / "out")
            assert "run the same command again" in (caught.value.hint or "")
            (disk / "other").unlink()
            assert _write(disk / "out") > 0
        assert _snapshot(disk / "out") == _undisturbed(tmp_path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Not ru_maxrss: that begins with what the process that started this one held.
PEAK = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np
from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.emit import Filling, write_artifact
from tests.emit.models import holder

tensors = {name: transposed(t) for name, t in open_safetensors(Path(sys.argv[1])).items()}
write_artifact(holder(tensors), Path(sys.argv[2]), filling=Filling(jobs=2, memory_limit=600 << 20))
fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(fields["VmHWM"].split()[0]) >> 10)
"""


def _sparse_weights(path: Path, layers: int) -> None:
    """BF16 zeros, 64 MiB a layer."""
    size = 4096 * 8192 * 2
    fields = {
        f"w{i}": {"dtype": "BF16", "shape": [4096, 8192], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(layers)
    }
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + layers * size)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 10):
        _sparse_weights(tmp_path / f"{layers}.safetensors", layers)
        command = [sys.executable, "-c", PEAK, str(tmp_path / f"{layers}.safetensors"), str(tmp_path / str(layers))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(done.stdout))
        shutil.rmtree(tmp_path / str(layers))
    assert max(peaks) < 600  # the limit, in MiB
    assert peaks[1] < peaks[0] + 200  # 512 MiB more of weights
