"""How the library meets TensorRT: opened by it, opened beside it, alone; never registered twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from l4convert.plugins.library import native
from l4convert.plugins.library.tools import find_tools

SCRIPT = """
import ctypes, sys
tensorrt, library, ways = sys.argv[1:]
trt = ctypes.CDLL(tensorrt) if tensorrt else None
for way in ways.split(","):
    if way == "open":
        ctypes.CDLL(library)
    elif way == "race":
        trt.stand_in_race(library.replace("plugins.so", "conformance_core.so").encode(), 2000)
    else:
        print("loaded", trt.stand_in_load(library.encode()))
if trt:
    print("registered", trt.stand_in_registered())
    trt.stand_in_create.restype = ctypes.c_char_p
    if trt.stand_in_registered():
        print(trt.stand_in_create(b"MoE").decode())
"""
SAID = 'empty: MoE: field "num_experts" is missing'


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in, under a name that TensorRT's library has."""
    tools = find_tools()
    path = tmp_path_factory.mktemp("tensorrt") / "libnvinfer.so.10"
    source = Path(__file__).with_name("libnvinfer.cpp")
    headers = [f"-isystem{folder}" for folder in (tools.tensorrt_include, tools.cuda_include)]
    options = ["-std=c++17", "-O0", "-shared", "-fPIC", "-pthread", *headers]
    command = [tools.compiler, *options, str(source), "-o", str(path), "-ldl"]
    subprocess.run(command, check=True)
    return path


def _run(tensorrt: Path | None, library: native.Library, ways: str, said: str = "", **environment: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, str(tensorrt or ""), str(library.path.resolve()), ways]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == said
    return done.stdout.splitlines()


def test_tensorrt_opens_the_library_and_registers_it(tensorrt: Path, interpreted_library: native.Library) -> None:
    """trtexec --dynamicPlugins, and what `build` does: it would fail if the library had registered itself."""
    assert _run(tensorrt, interpreted_library, "load") == ["loaded 1", "registered 2", SAID]


def test_opened_beside_tensorrt_it_registers_itself_once(tensorrt: Path, interpreted_library: native.Library) -> None:
    """trtexec --staticPlugins, Triton Inference Server; there the logger is that of the process."""
    assert _run(tensorrt, interpreted_library, "open,open") == ["registered 2", SAID]


def test_opened_then_loaded_is_as_with_any_plugin(tensorrt: Path, interpreted_library: native.Library) -> None:
    """TensorRT refuses what is there already; the plugins stay."""
    assert _run(tensorrt, interpreted_library, "open,load") == ["loaded 0", "registered 2", SAID]


def test_messages_do_not_wait_for_a_thread_that_opens_libraries(
    tensorrt: Path, interpreted_library: native.Library
) -> None:
    """Looking for TensorRT's logger goes over all loaded objects; the lock of their list is not kept for a dlopen."""
    assert _run(tensorrt, interpreted_library, "open,race") == ["registered 2", SAID]


def test_it_can_be_told_not_to(tensorrt: Path, interpreted_library: native.Library) -> None:
    silent = {"L4CONVERT_PLUGINS_REGISTER": "0"}
    assert _run(tensorrt, interpreted_library, "open", **silent) == ["registered 0"]
    assert _run(tensorrt, interpreted_library, "open,load", **silent) == ["loaded 1", "registered 2", SAID]


def test_without_tensorrt_nothing_happens(interpreted_library: native.Library) -> None:
    assert _run(None, interpreted_library, "open") == []


def test_another_major_number_of_tensorrt_is_not_called(tensorrt: Path, interpreted_library: native.Library) -> None:
    """Its registry and logger have other methods in the same places; its plugins are the same."""
    other = {"STAND_IN_VERSION": "990100"}
    library = interpreted_library
    warning = "l4convert: plugins are not registered: this library was built for TensorRT 10, and another major number"
    warning += " of it is here; set TENSORRT_ROOT and build it again\n"
    assert _run(tensorrt, library, "open", warning, **other) == ["registered 0"]
    assert _run(tensorrt, library, "load", f"l4convert: {SAID}\n", **other) == ["loaded 1", "registered 2", ""]
