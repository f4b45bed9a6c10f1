"""Building ``libl4convert_plugins.so``: the kernels (compile.py), a table of them as C++, and CMake for the rest.

Nothing here needs a GPU, CUDA or TensorRT: Triton brings ptxas and CUDA's headers, the wheel ``kernel-lens`` brings
TensorRT's (``TENSORRT_ROOT`` wins).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from l4convert.errors import InputError, UsageError
from l4convert.plugins.library.compile import Compiled, Job, compile_all, jobs_of, missing_of
from l4convert.plugins.library.resources import Resources
from l4convert.plugins.library.tables import write_sources
from l4convert.plugins.library.tools import Tools, find_tools
from l4convert.plugins.library.variants import COMPUTES, DEFAULT_HEAD_DIMS, DEFAULT_SMS, KNOWN_SMS, OPS, gather
from l4convert.progress import NO_PROGRESS, Progress

SOURCES = Path(__file__).resolve().parent
LIBRARY = "libl4convert_plugins.so"
# Made beside it where there are TensorRT's headers: the program that drives its plugins as TensorRT would, and the
# same for Python.
CONFORMANCE = "l4convert_conformance"
COMPANIONS = (CONFORMANCE, "libl4convert_conformance_core.so")


def cache_folder() -> Path:
    """Where compiled kernels are kept between builds: ``$XDG_CACHE_HOME``, or ``~/.cache``, under ``l4convert``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "l4convert" / "plugins"


@dataclass(frozen=True)
class BuildOptions:
    """What is to be built.

    Args:
        output: Folder of the library.
        sms: The GPUs it is for.
        head_dims: Head dimensions that the attention kernels are made for.
        computes: Types of activations that kernels are made for.
        jobs: Compilations at a time.
        cache: Where cubins and object files are kept.
        overwrite: Whether a library that is there may be replaced.
        ops: The ops and their packages.
        placeholders: Embed a few bytes in place of every cubin: for tests that never launch one on a GPU.
    """

    output: Path
    sms: tuple[int, ...] = DEFAULT_SMS
    head_dims: tuple[int, ...] = DEFAULT_HEAD_DIMS
    computes: tuple[str, ...] = COMPUTES
    jobs: int = 1
    cache: Path = field(default_factory=cache_folder)
    overwrite: bool = False
    ops: Mapping[str, str] = field(default_factory=lambda: OPS)
    placeholders: bool = False

    @property
    def library(self) -> Path:
        return self.output / LIBRARY

    @property
    def cubins(self) -> Path:
        return self.cache / "cubins"


@dataclass(frozen=True)
class Built:
    """A finished build.

    Args:
        library: The file.
        kernels: What is in it.
        compiled: How many of them this build compiled; the others were in the cache.
        tools: What it was built with.
    """

    library: Path
    kernels: tuple[Compiled, ...]
    compiled: int
    tools: Tools


def plan(options: BuildOptions) -> list[Job]:
    """Every kernel that the library will have, in its order.

    Raises:
        UsageError: An SM or head dimension that no kernel can be made for.
    """
    unknown = [sm for sm in options.sms if sm not in KNOWN_SMS]
    if unknown or not options.sms:
        known = ", ".join(map(str, KNOWN_SMS))
        raise UsageError(f"--sm {unknown[0] if unknown else ''}: there are kernels for {known}")
    wrong = [size for size in options.head_dims if size < 16 or size & (size - 1)]
    if wrong or not options.head_dims:
        raise UsageError(f"--head-dim {wrong[0] if wrong else ''}: a power of two, 16 or more")
    found = gather(sorted(set(options.head_dims)), options.ops, options.computes)
    return jobs_of(found, options.sms, options.ops)


def missing(options: BuildOptions, jobs: Sequence[Job]) -> list[Job]:
    """Those of ``jobs`` that would be compiled."""
    return missing_of(jobs, options.cubins)


def build(options: BuildOptions, progress: Progress = NO_PROGRESS) -> Built:
    """Compile, generate, link; the library appears whole or not at all. A second run compiles only what changed.

    Raises:
        BackendMissing: A tool that it needs is not installed.
        InputError: A compiler refused something, or there is a library already.
        UsageError: As :func:`plan`.
    """
    jobs = plan(options)
    if options.library.exists() and not options.overwrite:
        raise InputError(f"{options.library}: there is a library already", hint="--overwrite replaces it")
    tools = find_tools()
    compiled = 0 if options.placeholders else len(missing(options, jobs))
    if options.placeholders:
        kernels = [_placeholder(job) for job in jobs]
    else:
        kernels = compile_all(jobs, options.cubins, options.jobs, progress)
    with progress.task("Linking the library", None, "steps"), _work_folder(options.cache, tools) as work:
        write_sources(kernels, work / "generated")
        _cmake(work, tools, options.jobs)
        for name in COMPANIONS:
            made = work / "out" / "conformance" / name
            if made.is_file():
                _install(made, options.output / name)
        _install(work / "out" / LIBRARY, options.library)
    return Built(options.library, tuple(kernels), compiled, tools)


def _placeholder(job: Job) -> Compiled:
    warps = job.variant.num_warps
    resources = Resources(registers=0, spills=0, shared=0, blocks=0)
    return Compiled(job, f"placeholder of {job.text}".encode(), job.variant.kernel, warps, resources)


@contextmanager
def _work_folder(cache: Path, tools: Tools) -> Iterator[Path]:
    """The folder that CMake works in, for this copy of the sources and these tools; one build at a time has it."""
    key = hashlib.sha256(f"{SOURCES}\n{tools}".encode()).hexdigest()[:16]
    work = cache / f"cmake-{key}"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work


def _cmake(work: Path, tools: Tools, jobs: int) -> None:
    definitions = {
        "CMAKE_CXX_COMPILER": tools.compiler,
        "L4CONVERT_GENERATED": work / "generated",
        "TENSORRT_INCLUDE_DIRECTORY": tools.tensorrt_include or "",
        "CUDA_INCLUDE_DIRECTORY": tools.cuda_include or "",
    }
    generator = ["-G", "Ninja"] if tools.ninja else []
    made = [f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"] if tools.ninja else []
    configure = ["-S", str(SOURCES), "-B", str(work / "out"), *generator, *made]
    _run([tools.cmake, *configure, *(f"-D{name}={value}" for name, value in definitions.items())], work)
    _run([tools.cmake, "--build", str(work / "out"), "--parallel", str(jobs)], work)


def _run(command: Sequence[str], work: Path) -> None:
    """Run a build tool; what it says goes to a file, and its first error into the message."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    if done.returncode == 0:
        return
    log = work / "log.txt"
    text = done.stderr + done.stdout  # CMake complains on the one, Ninja shows what compilers said on the other
    log.write_text(text)
    raise InputError(f"the C++ build failed: {_first_error(text)}", hint=f"all that it said: {log}")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    at = next((number for number, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
    # CMake says where on the first line, and what on the next.
    return " ".join(lines[at : at + 2]) if lines[at].startswith("CMake Error") else lines[at]


def _install(made: Path, to: Path) -> None:
    """Copy a file to where it is wanted: whole or not at all, and at once for whoever has the old one open."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(made, partial)
        partial.chmod(0o755)
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
