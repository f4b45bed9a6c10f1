"""Triton kernels to cubins, ahead of time and without a GPU; one file a variant and SM in a content-addressed cache.

The compiler runs in processes of its own, so that neither an interpreter setting (``TRITON_INTERPRET``) nor a crash in
it reaches the caller, and as many as there are cores.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import importlib.util
import json
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path

from l4convert.errors import InputError, L4Error, backend_missing
from l4convert.plugins.library.resources import Resources, check_limits, read_resources
from l4convert.plugins.library.variants import OPS, Variant
from l4convert.progress import NO_PROGRESS, Progress

# Changes whenever a cached cubin of an earlier version of this file must not be used any more.
FORMAT = 2
ADDR_NO_RANDOMIZE = 0x0040000  # Linux's sys/personality.h; inherited by the programs that a process starts


@dataclass(frozen=True)
class Job:
    """One compilation.

    Args:
        op: The op's key in the table of packages.
        package: The op's Python package, which has ``kernels.py``.
        variant: What is compiled, already chosen for the SM (:meth:`Variant.at`).
        sm: For which GPU: 90 stands for 9.0.
    """

    op: str
    package: str
    variant: Variant
    sm: int

    @property
    def text(self) -> str:
        """What a message calls it."""
        return f"{self.variant.name} for SM {self.sm}"


@dataclass(frozen=True)
class Compiled:
    """A kernel as the library embeds it.

    Args:
        job: What was compiled.
        image: The cubin.
        symbol: The kernel's name in it.
        warps: Warps of a block, as the compiler decided (it may add some to the variant's).
        resources: What it takes of a multiprocessor.
    """

    job: Job
    image: bytes
    symbol: str
    warps: int
    resources: Resources


def jobs_of(variants: Mapping[str, Sequence[Variant]], sms: Sequence[int], ops: Mapping[str, str] = OPS) -> list[Job]:
    """Every compilation that a library of these variants and SMs needs, in a fixed order."""
    return [
        Job(op, ops[op], variant.at(sm), sm)
        for op, found in variants.items()
        for variant in sorted(found, key=lambda variant: variant.name)
        for sm in sorted(set(sms))
        if sm >= variant.least_sm
    ]


def compile_all(jobs: Sequence[Job], cache_dir: Path, workers: int, progress: Progress = NO_PROGRESS) -> list[Compiled]:
    """Compile what the cache does not have, and return everything in the order of ``jobs``.

    Raises:
        BackendMissing: Triton is not installed.
        InputError: The compiler refused a kernel, or it needs more than its SM has.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    missing = missing_of(jobs, cache_dir)
    if missing:
        _compile_missing(missing, cache_dir, min(workers, len(missing)), progress)
    return [_read(job, cache_dir) for job in jobs]


def triton_version() -> str:
    """The installed version, without importing Triton.

    Raises:
        BackendMissing: There is none.
    """
    try:
        return version("triton")
    except PackageNotFoundError:
        raise backend_missing("triton") from None


def missing_of(jobs: Sequence[Job], cache_dir: Path) -> list[Job]:
    """What has to be compiled: the jobs that the cache has no result of, each kernel once."""
    different = {_key(job): job for job in jobs}
    return [job for job in different.values() if not is_cached(job, cache_dir)]


def is_cached(job: Job, cache_dir: Path) -> bool:
    """Whether nothing is left to do for this one."""
    return _description_path(job, cache_dir).is_file()


@cache
def source_digest(module: str) -> str:
    """SHA-256 over a kernel file and the files of this package that it imports, by content."""
    seen: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name)
        if name in seen or spec is None or spec.origin is None:
            continue
        seen[name] = Path(spec.origin).read_bytes()
        own = name.split(".", 1)[0] + "."
        waiting += [imported for imported in _imports(seen[name], name) if imported.startswith(own)]
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name}\0{len(seen[name])}\0".encode() + seen[name])
    return digest.hexdigest()


def _imports(source: bytes, module: str) -> list[str]:
    """Every module that a module's source imports, by its full name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.rsplit(".", node.level)[0] if node.level else ""
            source_module = ".".join(part for part in (above, node.module) if part)
            names += [source_module, *(f"{source_module}.{alias.name}" for alias in node.names)]
    return [name for name in names if _is_module(name)]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def _key(job: Job) -> str:
    variant = {**asdict(job.variant), "divisible": sorted(job.variant.divisible)}
    del variant["name"]  # two variants may be one kernel on some SM
    # The order of a signature is the order of the parameters, so it is part of the key.
    text = json.dumps([FORMAT, triton_version(), source_digest(f"{job.package}.kernels"), job.sm, variant])
    return hashlib.sha256(text.encode()).hexdigest()


def _image_path(job: Job, cache_dir: Path) -> Path:
    return cache_dir / f"{_key(job)}.cubin"


def _description_path(job: Job, cache_dir: Path) -> Path:
    return cache_dir / f"{_key(job)}.json"


def _read(job: Job, cache_dir: Path) -> Compiled:
    if not is_cached(job, cache_dir):
        raise InputError(f"{job.text}: its source changed while it was compiled", hint="run the command again")
    description = json.loads(_description_path(job, cache_dir).read_text())
    resources = Resources(**description["resources"])
    return Compiled(
        job, _image_path(job, cache_dir).read_bytes(), description["symbol"], description["warps"], resources
    )


def _compile_missing(missing: Sequence[Job], cache_dir: Path, workers: int, progress: Progress) -> None:
    triton_version()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        with progress.task("Compiling kernels", len(missing), "kernels") as task:
            running = {pool.submit(_compile, job, cache_dir): job for job in missing}
            for done in as_completed(running):
                _result(done, running[done])
                task.advance(1)
    except BaseException:
        # A compilation takes seconds and cannot be cancelled; what is half done would only be thrown away.
        for process in list((pool._processes or {}).values()):  # noqa: SLF001 - there is no public way before 3.14
            process.terminate()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _result(done: Future[str | None], job: Job) -> None:
    try:
        problem = done.result()
    except BrokenProcessPool:
        raise L4Error(f"{job.text}: the compiler's process ended (out of memory, or a fault in Triton)") from None
    if problem is not None:
        raise InputError(f"{job.text}: {problem}")


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends the workers
    os.environ.pop("TRITON_INTERPRET", None)
    # ptxas chooses between equal registers by the addresses of its own data. Where they are not randomised, the same
    # source gives the same bytes; some containers do not allow that, and a kernel in hundreds differs there.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def _compile(job: Job, cache_dir: Path) -> str | None:
    """Runs in a worker: write the cubin and its description; return what is wrong, as one line."""
    import triton

    # Before the kernel's source is imported: what changes from now on must not be kept under its later name.
    source_digest(f"{job.package}.kernels")
    triton.knobs.compilation.disable_line_info = True
    with tempfile.TemporaryDirectory(prefix="l4convert-triton-") as scratch:
        triton.knobs.cache.dir = scratch
        try:
            compiled = _run_triton(job)
        except Exception as error:  # whatever a compiler raises is about the kernel
            return _first_line(error)
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        return "it needs scratch memory that the library does not give (a descriptor made on the device?)"
    if metadata.launch_cooperative_grid or metadata.launch_pdl or metadata.num_ctas != 1:
        return "it needs a cluster, cooperative or dependent launch, which the library does not do"
    image = compiled.asm["cubin"]
    resources = read_resources(image, metadata.name, job.sm, metadata.shared, metadata.num_warps, metadata.tmem_size)
    problem = check_limits(resources, job.sm)
    if problem is None:
        description = {"symbol": metadata.name, "warps": metadata.num_warps, "resources": asdict(resources)}
        _write(_image_path(job, cache_dir), image)
        _write(_description_path(job, cache_dir), json.dumps(description).encode())
    return problem


def _run_triton(job: Job):  # type: ignore[no-untyped-def]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"{job.package}.kernels"), job.variant.kernel)
    variant = job.variant
    signature = {name: variant.signature.get(name, "constexpr") for name in kernel.arg_names}
    unknown = {*variant.signature, *variant.constants} ^ set(kernel.arg_names)
    if unknown or list(variant.signature) != [name for name in kernel.arg_names if name in variant.signature]:
        raise ValueError(f"the variant's parameters are not the kernel's, in its order: {sorted(unknown)}")
    aligned = [
        index
        for index, name in enumerate(kernel.arg_names)
        if name in variant.divisible or signature[name].startswith("*")
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.max_registers}
    return triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=options)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Triton shows the source, a caret under the place, and then what is wrong with it.
    caret = next((number for number, line in enumerate(lines) if line.startswith("^")), -1)
    first = lines[caret + 1] if caret + 1 < len(lines) else "no message"
    cause = f": {_first_line(error.__cause__)}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {first}{cause}"


def _write(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    Path(name).replace(path)
