"""Plugin libraries with placeholders for their cubins, and GPUs that run them in the interpreter."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from l4convert.plugins.library import native
from l4convert.plugins.library.build import BuildOptions, build
from l4convert.plugins.library.variants import DEFAULT_SMS, OPS
from tests.conftest import PLUGINS

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


def _placeholder_library(
    factory: pytest.TempPathFactory, ops: Mapping[str, str], head_dims: tuple[int, ...]
) -> native.Library:
    output = factory.mktemp("library")
    options = BuildOptions(
        output,
        sms=DEFAULT_SMS,
        head_dims=head_dims,
        cache=PLUGINS / "cache",
        ops=ops,
        placeholders=True,
        jobs=os.cpu_count() or 1,
    )
    return native.load(build(options).library)
