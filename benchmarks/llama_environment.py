"""llama.cpp in an environment of its own, ``.venv-llama``: made when first asked for, which compiles for some minutes.

    python benchmarks/llama_environment.py        make it now

The source distribution of llama-cpp-python holds llama.cpp itself: the library is compiled from it, and its converter,
which no wheel has, is run from it, so that both are of one version.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

from measuring import Unavailable, remove

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".venv-llama"
STAMP = FOLDER / ".installed"
REQUIREMENTS = HERE / "requirements-llama.txt"
PACKAGE = "llama-cpp-python"
# GGML_NATIVE is the default of llama.cpp's own builds: all instructions that this processor has. No image models.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}


@dataclass(frozen=True)
class Llama:
    """The interpreter of the environment, llama.cpp's source folder, and the version of llama-cpp-python."""

    python: Path
    source: Path
    version: str


def llama() -> Llama:
    """The environment, made anew where its requirements or our Python have changed.

    Raises:
        Unavailable: It could not be made: no network, no compiler.
    """
    with REQUIREMENTS.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs beside each other make it once
        if not ready():
            install()
            STAMP.write_text(wanted())
    pins = dict(line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line)
    source = next((FOLDER / "source").glob("*/vendor/llama.cpp"), None)
    if source is None:
        raise Unavailable(f"the source distribution of {PACKAGE} has no vendor/llama.cpp")
    return Llama(FOLDER / "bin" / "python", source, pins[PACKAGE])


def ready() -> bool:
    """Whether the environment is there, and made as it would be made now."""
    return STAMP.is_file() and STAMP.read_text() == wanted()


def wanted() -> str:
    return f"{sys.version}\n{BUILD}\n{REQUIREMENTS.read_text()}"


def install() -> None:
    """Download the source distribution, compile it, unpack it."""
    print(f"Making {FOLDER.name}: {PACKAGE} is compiled, which takes minutes", file=sys.stderr, flush=True)
    remove(FOLDER)
    venv.create(FOLDER, with_pip=True)
    (FOLDER / ".gitignore").write_text("*\n")
    archives = FOLDER / "source"
    requirement = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith(PACKAGE))
    pip("download", "--no-deps", "--no-binary", PACKAGE, "--dest", archives, requirement)
    archive = next(archives.glob("*.tar.gz"))
    pip("install", "--no-binary", PACKAGE, "--find-links", archives, "--requirement", REQUIREMENTS)
    with tarfile.open(archive) as contents:
        contents.extractall(archives, filter="data")


def pip(*arguments: str | Path) -> None:
    command = [FOLDER / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **BUILD})
    if done.returncode:
        lines = [line.strip() for line in ("no message\n" + done.stdout + done.stderr).splitlines() if line.strip()]
        worst = next((line for line in lines if line.lower().startswith("error")), lines[-1])
        raise Unavailable(f"pip {arguments[0]} of {PACKAGE} failed: {worst}")


if __name__ == "__main__":
    try:
        print(llama().python)
    except Unavailable as error:
        sys.exit(f"error: {error}")
