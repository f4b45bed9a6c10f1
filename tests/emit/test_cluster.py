"""Conversion on a real Ray cluster: machines that are lost, a driver that is killed, and what users are told."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.pipeline import ConvertOptions, convert
from tests.checkpoints import write_random_checkpoint

ROOT = Path(__file__).parents[2]
NO_USAGE = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
# Python runs this in every process of a node: writes at offsets, which only jobs do there, take time and are counted.
SITE = """
import os, time
_pwrite = os.pwrite
def _slow(descriptor, data, offset):
    time.sleep(0.03)
    while os.path.exists(os.environ["TEST_WRITES"] + ".held"):
        time.sleep(0.02)
    with open(os.environ["TEST_WRITES"], "a") as log:
        log.write("x")
    return _pwrite(descriptor, data, offset)
os.pwrite = _slow
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


class Node:
    """A node process with one CPU; ``ray start --block`` is the parent of its raylet."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self._writes = folder / f"writes-{name}"
        self._writes.touch()
        self._held = folder / f"writes-{name}.held"
        environment = {
            **os.environ,
            **NO_USAGE,
            "PYTHONPATH": f"{folder}:{ROOT}",
            "TEST_WRITES": str(self._writes),
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # https://github.com/ray-project/ray/issues/63202
        }
        fixed = ["--block", "--num-cpus=1", "--object-store-memory=80000000", f"--temp-dir={folder}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *fixed, "--include-log-monitor=false"]
        self._log = folder / f"log-{name}"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def started(self) -> bool:
        """Whether the cluster knows it."""
        return "Ray runtime started" in self._log.read_text()

    @property
    def writes(self) -> int:
        """How many blocks of weights it has written."""
        return self._writes.stat().st_size

    def hold(self) -> None:
        """Let what it writes wait."""
        self._held.touch()

    def release(self) -> None:
        """Let it go on."""
        self._held.unlink()

    def lose(self) -> None:
        """Kill its raylet, as a machine that loses power."""
        os.kill(self._raylet(), signal.SIGKILL)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _raylet(self) -> int:
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, name, _, parent, *_ = status.read_text().split()
            except OSError:
                continue
            if name == "(raylet)" and int(parent) == self._process.pid:
                return int(pid)
        raise AssertionError("no raylet")


class Cluster:
    """A head node, and others that a test adds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(SITE)
        gcs, client = _free_port(), _free_port()
        self._gcs = f"127.0.0.1:{gcs}"
        self.address = f"ray://127.0.0.1:{client}"
        ports = [f"--port={gcs}", f"--ray-client-server-port={client}"]
        self.head = Node(folder, "head", "--head", "--include-dashboard=false", *ports)
        self._nodes = [self.head]
        _wait_for(lambda: _answers(client))

    def add(self, name: str) -> Node:
        node = Node(self._folder, name, f"--address={self._gcs}")
        self._nodes.append(node)
        return node

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.stop()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray")
    folder = Path(tempfile.mkdtemp(prefix="l4"))  # short: names of sockets in it may have 107 bytes
    running = Cluster(folder)
    yield running
    running.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("cluster") / "checkpoint")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, bytes]:
    out = checkpoint.parent / "local"
    convert(ConvertOptions(checkpoint=checkpoint, output=out, recipe="fp8"))
    return _snapshot(out)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _wait_for_lines(folder: Path, lines: int, run: subprocess.Popen[str]) -> None:
    """Until the journal of the run that writes ``folder / "out"`` has more lines, or the run has ended."""
    journal = folder / ".out.partial" / "journal"
    _wait_for(lambda: (journal.exists() and journal.read_bytes().count(b"\n") > lines) or run.poll() is not None)


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _start(checkpoint: Path, out: Path, address: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "l4convert", "convert", str(checkpoint), "--output", str(out), "--json"]
    return subprocess.Popen(
        [*command, "--recipe", "fp8", "--cluster", address, *options],
        env={**os.environ, **NO_USAGE, "PYTHONPATH": str(ROOT)},
        cwd=out.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_a_driver_that_was_killed_goes_on_also_while_its_tasks_still_run(
    cluster: Cluster, checkpoint: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    first = _start(checkpoint, tmp_path / "out", cluster.address)
    _wait_for_lines(tmp_path, 10, first)
    first.kill()
    assert _finish(first)[0] == -signal.SIGKILL
    code, out, err = _finish(_start(checkpoint, tmp_path / "out", cluster.address))
    assert (code, err) == (0, "")
    assert json.loads(out)["resumed_bytes"] > 0
    assert _snapshot(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_machine_that_joined_and_is_lost(
    cluster: Cluster, checkpoint: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    before = cluster.head.writes
    other = cluster.add("lost")
    _wait_for(other.started)
    cluster.head.hold()
    run = _start(checkpoint, tmp_path / "out", cluster.address, "--jobs", "8")  # tasks of at most 6 jobs
    # A machine counts when it has ended a task, so it is lost in its third, or later.
    _wait_for(lambda: other.writes > 12)
    other.hold()
    cluster.head.release()
    _wait_for(lambda: cluster.head.writes - before > 12)
    other.lose()
    assert run.poll() is None, "it did not need the machine any more"
    code, out, err = _finish(run)
    assert (code, err) == (0, "")
    assert json.loads(out)["machines"] == 2
    assert _snapshot(tmp_path / "out") == expected


def test_an_interruption_leaves_what_another_run_continues(
    cluster: Cluster, checkpoint: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    run = _start(checkpoint, tmp_path / "out", cluster.address)
    _wait_for_lines(tmp_path, 5, run)
    run.send_signal(signal.SIGINT)
    assert _finish(run) == (130, "", "\ninterrupted\n")
    # The cluster is not needed to go on.
    done = convert(ConvertOptions(checkpoint=checkpoint, output=tmp_path / "out", recipe="fp8"))
    assert done.resumed_bytes > 0
    assert _snapshot(tmp_path / "out") == expected


def test_what_a_machine_meets_is_told_as_it_would_be_here(cluster: Cluster, tmp_path: Path) -> None:
    broken = write_random_checkpoint(tmp_path / "broken")
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    offset = open_safetensors(file)["lm_head.weight"].offset
    data[offset : offset + 20] = b"\xff" * 20  # NaN in BF16
    file.write_bytes(data)
    code, out, err = _finish(_start(broken, tmp_path / "out", cluster.address))
    assert (code, out) == (3, "")
    where = socket.gethostname()
    found = r"tensor 'lm_head.weight': 10 of the 8192 values .* are NaN or infinite"
    assert re.fullmatch(rf"error: model.safetensors: {found} \(on {where}\)\nhint: .*\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_nobody_answers(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    address = f"ray://127.0.0.1:{_free_port()}"
    start = time.monotonic()
    code, out, err = _finish(_start(tmp_path / "absent", tmp_path / "out", address))
    assert time.monotonic() - start < 60
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {address}: no cluster can be reached there: ")
    assert err.count("\n") == 2
    assert list(tmp_path.iterdir()) == []


def test_ray_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(name='ray')")
    command = [sys.executable, "-m", "l4convert", "convert", "absent", "--output", "out", "--cluster", "auto"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 5
    assert done.stderr == "error: ray is not installed: pip install 'ray[client]'\n"
    assert not (tmp_path / "out").exists()
