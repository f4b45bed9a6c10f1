"""What ``benchmarks/convert.py`` times: commands on one checkpoint, and what they need beforehand."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llama_environment import llama
from measuring import Unavailable, size_of

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "l4convert" / "quantization" / "recipes" / "int4.toml"
WARM, COLD = "warm", "cold"
COPY, OURS, LLAMA, ORT = "copy", "l4convert", "llama.cpp", "onnxruntime"
READ, CP = "read", "cp"
BLOCK_SIZES = (32, 128)
SCALES = ("lse", "absmax")
MODULE = (sys.executable, "-m", "l4convert")


@dataclass(frozen=True)
class Source:
    """The checkpoint: its folder, its weight files, parameters of the text decoder, bytes of the files."""

    folder: Path
    files: tuple[Path, ...]
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Workload:
    """A command to time.

    Attributes:
        what: Its name in the table.
        group: Whose it is.
        command: Program and arguments; none where it cannot run, for the reason ``missing``.
        reads: Files that are in memory before it starts, or are not, as ``cache`` says.
        output: What it writes; removed before each run, and after it unless another one reads it (``keep``).
        environment: Variables to set.
    """

    what: str
    group: str
    command: tuple[str | Path, ...] = ()
    reads: tuple[Path, ...] = ()
    output: Path | None = None
    cache: str = WARM
    keep: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def open_source(folder: Path) -> Source:
    """Ask our own ``inspect`` whether it is a checkpoint, and for its size.

    Raises:
        Unavailable: It is none.
    """
    command = [*MODULE, "inspect", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(done.stderr.strip())
    files = tuple(sorted(folder.glob("*.safetensors")))
    return Source(folder, files, int(json.loads(done.stdout)["parameters"]), sum(size_of(file) for file in files))


def workloads(options: argparse.Namespace, source: Source, scratch: Path) -> Iterator[Workload]:
    """All of them, in the order of the table; those that were not asked for, or cannot run, say so."""
    steps: dict[str, Callable[[str], Iterable[Workload]]] = {
        COPY: lambda cache: copies(source, scratch / "copy", cache),
        OURS: lambda cache: conversions(options, source, scratch, cache),
        LLAMA: lambda cache: llama_steps(options, source, scratch) if cache == WARM else (),
        ORT: lambda cache: onnxruntime_steps(options, source) if cache == WARM else (),
    }
    for cache in (WARM, COLD):
        for group, make in steps.items():
            skipped = next((name for name in (cache, group) if name in options.skip), None)
            if skipped is None:
                yield from make(cache)
            elif cache == WARM or group in (COPY, OURS):
                yield Workload(group, group, cache=cache, missing=f"skipped (--skip {skipped})")


def require_room(options: argparse.Namespace, source: Source, scratch: Path) -> None:
    """What lies there at once: llama.cpp's BF16 file, and either a copy or what a quantizer wrote.

    Raises:
        Unavailable: The disk is too small.
    """
    needed = source.bytes * (1 + (LLAMA not in options.skip)) * 11 // 10
    free = shutil.disk_usage(scratch).free
    if needed > free:
        raise Unavailable(f"{scratch}: about {needed} bytes are needed, {free} are free: {needed - free} too few")


def copies(source: Source, target: Path, cache: str) -> Iterator[Workload]:
    """Reading alone where that takes a disk, then ``cp``, which ends before its bytes are on the disk, so fsync too."""
    if cache == COLD:
        script = 'for f; do dd if="$f" of=/dev/null bs=4M status=none || exit; done'
        yield Workload(READ, COPY, ("sh", "-c", script, "sh", *source.files), source.files, cache=cache)
    copy = 'mkdir "$0" && cp --reflink=never --sparse=never "$@" "$0"'
    for what, script in ((CP, copy), (f"{CP}, then fsync", f'{copy} && sync "$0"/*')):
        yield Workload(what, COPY, ("sh", "-c", script, target, *source.files), source.files, target, cache)


def conversions(options: argparse.Namespace, source: Source, scratch: Path, cache: str) -> Iterator[Workload]:
    """Our command line with the bundled INT4 recipe, or with that recipe's scales taken otherwise."""
    for scale in options.scales:
        recipe = scratch / f"int4-{scale}.toml"
        recipe.write_text(RECIPE.read_text().replace('scale = "lse"', f'scale = "{scale}"'))
        for size in options.block_sizes:
            output = scratch / "artifact"
            arguments = ["--recipe", str(recipe), "--block-size", str(size), "--target", "cpu", "--quiet"]
            arguments += shlex.split(options.convert_options)
            command: tuple[str | Path, ...] = (*MODULE, "convert", source.folder, "--output", output, *arguments)
            yield Workload(f"l4convert int4 {scale}, block {size}", OURS, command, source.files, output, cache)


def llama_steps(options: argparse.Namespace, source: Source, scratch: Path) -> Iterator[Workload]:
    """Its converter, then its quantizer on what that wrote."""
    try:
        peer = llama()
    except Unavailable as error:
        yield Workload(LLAMA, LLAMA, missing=str(error))
        return
    script, whole = (peer.python, HERE / "peer_llama.py"), scratch / "bf16.gguf"
    command = (*script, "convert", peer.source, source.folder, whole)
    offline = {"HF_HUB_OFFLINE": "1"}
    yield Workload(f"{LLAMA} convert", LLAMA, command, source.files, whole, keep=True, environment=offline)
    for kind in options.llama_types:
        output = scratch / f"{kind}.gguf"
        arguments = ("quantize", whole, output, "--type", kind, "--threads", str(options.threads))
        yield Workload(f"{LLAMA} quantize {kind}", LLAMA, (*script, *arguments), (whole,), output)


def onnxruntime_steps(options: argparse.Namespace, source: Source) -> Iterator[Workload]:
    """Its quantizer on a sample; nothing but its own work is timed, so the state of the cache does not matter."""
    for size in options.block_sizes:
        command = (sys.executable, HERE / "peer_onnxruntime.py", source.folder, "--block-size", str(size))
        yield Workload(f"ONNX Runtime quantizer, block {size}", ORT, command)
