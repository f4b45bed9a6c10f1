"""What cannot work is refused before anything is built, with the reason and the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4convert.engine.backend import MODULES
from l4convert.engine.network import GraphFacts
from l4convert.errors import InputError, UsageError
from l4convert.progress import format_amount
from l4convert.targets.hardware import Hardware

_REMEDY = {
    "fp8": "convert again with --recipe int4, or build for a GPU that has FP8",
    "fp4": "convert again with another recipe",
    "bf16": "convert again with --compute float16",
}


def require_engine_target(out: Path, target: str) -> None:
    """Refuse an artifact whose graph no engine builder takes.

    Raises:
        UsageError: It is of another target.
    """
    if target not in MODULES:
        raise UsageError(
            f"{out}: was converted for the target {target!r}, from which no engine can be built",
            "convert again with --target tensorrt-rtx",
        )


def require_runtime(hardware: Hardware, target: str) -> None:
    """Refuse hardware that the runtime of an artifact's target does not run on.

    Raises:
        UsageError: It does not; the hint names a target that does.
    """
    if target in hardware.runtimes:
        return
    if not hardware.runtimes:
        raise UsageError(f"{hardware.name}: has no GPU, and engines are for GPUs", "`l4convert targets` lists GPUs")
    raise UsageError(
        f"{hardware.name}: {target} has no engines for compute capability {hardware.compute_capability}",
        f"convert again with --target {' or '.join(hardware.runtimes)}",
    )


def require_precisions(hardware: Hardware, facts: GraphFacts) -> None:
    """Refuse a graph with numbers that a GPU has no instructions for.

    Raises:
        UsageError: It has such numbers.
    """
    for precision in sorted(facts.precisions - set(hardware.precisions)):
        raise UsageError(
            f"{hardware.name}: the artifact has {precision.upper()} numbers, which compute capability"
            f" {hardware.compute_capability} cannot compute with",
            _REMEDY.get(precision),
        )


def require_gpu_memory(hardware: Hardware, weights: int, caches: int, engine: str) -> None:
    """Refuse an engine that the GPU could not load: its weights and its caches are more than the GPU's memory.

    Raises:
        UsageError: They are.
    """
    memory = hardware.memory_bytes
    if memory is not None and weights + caches > memory:
        raise UsageError(
            f"{hardware.name}: {engine} needs {format_amount(weights, 'B')} for weights and"
            f" {format_amount(caches, 'B')} for caches, the GPU has {format_amount(memory, 'B')}",
            "lower --max-context or --max-batch, or cut the model with --layers-per-engine",
        )


def require_same_graph(path: Path, digest: str, manifest: dict[str, Any]) -> None:
    """Refuse a graph that is not the one that was converted.

    Raises:
        InputError: Its digest is not the manifest's.
    """
    entry = manifest.get("files", {}).get(path.name)
    if not isinstance(entry, dict) or entry.get("sha256") != digest:
        raise InputError(f"{path}: was changed after it was written", "convert again, or copy the artifact again")
