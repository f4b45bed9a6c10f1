"""Checkpoints that several test modules read."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from tests.checkpoints import MAVERICK, write_random_checkpoint

# A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
# Where `make plugins` builds; what is compiled there serves later runs.
PLUGINS = REPO / "build" / "plugins"

# How long something takes is measured in benchmarks/; on a busy machine it must not fail a test.
hypothesis.settings.register_profile(
    "l4convert", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("l4convert")


# Files of a few long tests. Begun last, they would keep one process busy when the others have nothing left to do.
LONGEST = ("test_examples.py", "test_kills.py", "test_optimum.py", "test_cluster.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; files keep their order otherwise, and so do the tests of a file."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def scout_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, every layer MoE, QK norm, scaled RoPE, top-1; chunks of 8."""
    return write_random_checkpoint(tmp_path_factory.mktemp("scout_layout"))


@pytest.fixture(scope="session")
def maverick_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, every second layer MoE, no QK norm, unscaled RoPE, top-1; chunks of 8."""
    return write_random_checkpoint(tmp_path_factory.mktemp("maverick_layout"), **MAVERICK)


@pytest.fixture(scope="session")
def nano() -> Path:
    """The trained nano Scout of examples/01."""
    path = REPO / "examples" / "01_convert_nano_scout" / "checkpoint"
    if not path.is_dir():
        pytest.skip(f"{path.relative_to(REPO)} is absent; make it with {path.parent.name}/train.py")
    return path


@pytest.fixture(scope="session")
def tiny_scout() -> Path:
    """The trained 16.5 M parameter Scout that lies beside the repository on some machines."""
    path = REPO.parent / "shared" / "checkpoints" / "tiny-scout"
    if not path.is_dir():
        pytest.skip("../shared/checkpoints/tiny-scout is absent")
    return path


@pytest.fixture(scope="session")
def built_library() -> Path:
    """libl4convert_plugins.so as a user builds it: all five SMs, by the command. One process builds, all share it.

    Only kernels for bfloat16 activations: those for float16 are the same sources, and twice as many take twice as long.
    """
    PLUGINS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "l4convert", "plugins", "build", "--output", str(PLUGINS), "--overwrite"]
    command += ["--cache", str(PLUGINS / "cache"), "--jobs", str(os.cpu_count() or 1), "--compute", "bf16"]
    with (PLUGINS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return PLUGINS / "libl4convert_plugins.so"
