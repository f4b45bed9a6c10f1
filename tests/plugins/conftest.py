"""The plugin library, built once a session and shared by the test processes, and GPUs that run it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from l4convert.plugins.library import native
from l4convert.plugins.library.build import LIBRARY, BuildOptions, build
from l4convert.plugins.library.variants import DEFAULT_SMS, OPS

REPO = Path(__file__).resolve().parent.parent.parent
BUILD = REPO / "build" / "plugins"
DEMO = {"demo": "tests.plugins.demo"}
# Of the stand-in's library: small ones keep the interpreter quick.
HEAD_DIMS = (16, 32, 64, 128)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-in for CUDA's driver, in this process from now on."""
    from tests.plugins.stand_in import compile_driver

    return compile_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def demo_library(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    """The demonstration kernel for all SMs, with placeholders for its cubins."""
    return _placeholder_library(tmp_path_factory, DEMO, (32, 64))


@pytest.fixture(scope="session")
def interpreted_library(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    """Both ops for all SMs and small head dimensions, with placeholders for their cubins."""
    return _placeholder_library(tmp_path_factory, OPS, HEAD_DIMS)


@pytest.fixture
def make_gpu(interpreted_library: native.Library, driver: ctypes.CDLL) -> Callable[..., Any]:
    """Make a :class:`tests.plugins.stand_in.StandIn` of both ops: ``make_gpu(sm=90, multiprocessors=4)``."""
    from tests.plugins.stand_in import StandIn

    return lambda **options: StandIn(interpreted_library, driver, **options)


@pytest.fixture
def gpu(make_gpu: Callable[..., Any]) -> Any:
    """An SM 9.0 with four multiprocessors."""
    return make_gpu()


@pytest.fixture(scope="session")
def built_library() -> Path:
    """The library as a user builds it: all five SMs, through the command line, under ``build/plugins``."""
    command = [sys.executable, "-m", "l4convert", "plugins", "build", "--output", str(BUILD), "--overwrite"]
    command += ["--cache", str(BUILD / "cache"), "--jobs", str(os.cpu_count() or 1)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return BUILD / LIBRARY


def _placeholder_library(
    factory: pytest.TempPathFactory, ops: Mapping[str, str], head_dims: tuple[int, ...]
) -> native.Library:
    output = factory.mktemp("library")
    options = BuildOptions(
        output,
        sms=DEFAULT_SMS,
        head_dims=head_dims,
        cache=BUILD / "cache",
        ops=ops,
        placeholders=True,
        jobs=os.cpu_count() or 1,
    )
    return native.load(build(options).library)
