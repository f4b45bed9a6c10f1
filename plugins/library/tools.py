"""What a build of the plugin library needs besides Python: found here, or named with the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from l4convert.errors import BackendMissing, InputError, backend_missing

TENSORRT_HEADER = "NvInferRuntime.h"
CUDA_HEADER = "cuda_runtime_api.h"


@dataclass(frozen=True)
class Tools:
    """Paths of programs and header folders.

    Args:
        cmake: CMake, 3.22 or newer.
        compiler: A C++17 compiler.
        ninja: Ninja, where there is one; CMake's default generator otherwise.
        tensorrt_include: TensorRT's headers; None builds a library without the TensorRT plugins.
        cuda_include: CUDA's headers, which TensorRT's include; None without those.
    """

    cmake: str
    compiler: str
    ninja: str | None
    tensorrt_include: str | None
    cuda_include: str | None


def find_tools() -> Tools:
    """Look at the environment.

    Raises:
        BackendMissing: CMake or a compiler is missing.
        InputError: ``TENSORRT_ROOT`` is set, and there are no headers in it.
    """
    cmake = _program("cmake")
    if cmake is None:
        raise backend_missing("cmake")
    compiler = os.environ.get("CXX") or _program("c++") or _program("g++") or _program("clang++")
    if compiler is None or shutil.which(compiler) is None:
        named = f"CXX names {compiler}, which is not there" if compiler else "there is no C++ compiler"
        raise BackendMissing(f"{named}: apt-get install g++ (or your system's command for it)")
    tensorrt = tensorrt_include()
    cuda = None if tensorrt is None else cuda_include(tensorrt)
    return Tools(cmake, compiler, _program("ninja"), *map(_text, (tensorrt, cuda)))


def tensorrt_include() -> Path | None:
    """TensorRT's headers: of ``TENSORRT_ROOT``, else of the wheel kernel-lens, else none.

    Raises:
        InputError: ``TENSORRT_ROOT`` is set, and there are no headers in it.
    """
    root = os.environ.get("TENSORRT_ROOT")
    if root:
        folders = [Path(root) / "include", *sorted((Path(root) / "include").glob("*-linux-gnu")), Path(root)]
        found = _with_header(folders, TENSORRT_HEADER)
        if found is None:
            raise InputError(f"TENSORRT_ROOT={root}: no include/{TENSORRT_HEADER} there")
        return found
    folder = _package("kernel_lens")
    return None if folder is None else _with_header([folder / "include" / "tensorrt"], TENSORRT_HEADER)


def cuda_include(tensorrt: Path) -> Path | None:
    """CUDA's headers: of ``CUDA_HOME``, beside TensorRT's, of Triton's wheel, or where NVIDIA installs them.

    Raises:
        BackendMissing: None of them has any.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    triton = _package("triton")
    folders = [
        *([Path(home) / "include"] if home else []),
        tensorrt,
        *([triton / "backends" / "nvidia" / "include"] if triton else []),
        Path("/usr/local/cuda/include"),
    ]
    found = _with_header(folders, CUDA_HEADER)
    if found is None:
        raise backend_missing("triton")
    return found


def _program(name: str) -> str | None:
    """A program of this Python environment (pip installs them there), or of the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _with_header(folders: list[Path], header: str) -> Path | None:
    return next((folder for folder in folders if (folder / header).is_file()), None)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
