"""Measure an artifact, and transformers beside it, against the length of the context."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from l4convert import __version__
from l4convert.bench import ours, peer
from l4convert.bench.caches import CacheSizes, require_room
from l4convert.bench.process import apart
from l4convert.bench.results import DEFAULT_CONTEXTS, BenchOptions, BenchReport, Curve
from l4convert.bench.sweep import Sweep
from l4convert.checkpoint import open_checkpoint
from l4convert.errors import InputError, UsageError
from l4convert.planning.tokens import short_tokens
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.runtime.manifest import ArtifactInfo, read_artifact

_LIBRARIES = ("numpy", "onnxruntime-gpu", "onnxruntime", "torch", "transformers")


def bench(options: BenchOptions, progress: Progress = NO_PROGRESS) -> BenchReport:
    """Measure everything that is asked for, each runner in a process of its own, one after the other.

    Raises:
        UsageError: Lengths that the model or the memory has no room for.
        InputError, BackendMissing, DeviceError: What opening the artifact or the checkpoint raises.
    """
    info = read_artifact(options.artifact)
    plan = plan_sweep(info, options)
    if options.reference is not None:
        _require_same_model(info, options.reference)
    curve = _ours(options, info, plan, progress)
    reference = None if options.reference is None else _theirs(options, options.reference, plan, progress)
    return BenchReport(curve, reference, _facts(options, info))


def plan_sweep(info: ArtifactInfo, options: BenchOptions) -> Sweep:
    """The lengths to measure.

    Raises:
        UsageError: They do not ascend, are too close to each other, or are more than the model has positions or the
            memory has room for.
    """
    most = info.config.max_position_embeddings
    contexts = options.contexts
    if contexts is None:
        contexts = tuple(context for context in DEFAULT_CONTEXTS if context <= most) or (most,)
    if max(contexts) > most:
        raise UsageError(f"a context of {max(contexts)} tokens is more than the model's {most} positions")
    for before, context in pairwise((0, *contexts)):
        if context - before <= options.decode_tokens:
            where = f"between {before} and {context} tokens" if before else f"up to {context} tokens"
            raise UsageError(
                f"{where} there is no room for {options.decode_tokens} decoded tokens",
                "give the lengths in ascending order, or a smaller --decode-tokens",
            )
    if options.run_with.engine is None:
        longest = contexts[-1]
        caches = CacheSizes.of(info).at_once(longest)
        require_room(f"{options.artifact}: caches ({info.kv_cache}) for {short_tokens(longest)} tokens", caches)
    return Sweep(info.config, contexts, options.decode_tokens, options.synthetic)


def _require_same_model(info: ArtifactInfo, reference: Path) -> None:
    if open_checkpoint(reference).config != info.config:
        raise InputError(
            f"{reference}: not the model that {info.path} was made from: their configurations differ",
            "give --reference the checkpoint that was converted",
        )


def _ours(options: BenchOptions, info: ArtifactInfo, plan: Sweep, progress: Progress) -> Curve:
    order = ours.Order(options.artifact, options.run_with, options.threads, plan)
    with progress.task(f"Measuring {info.path.name}", total=plan.tokens, unit="tokens") as task:
        curve = apart(ours.measure, order, task)
    # On a GPU the profiler sees how long kernels take to launch, which is not where the time goes.
    if not options.breakdown or options.run_with.engine is not None or options.run_with.provider == "cuda":
        return curve
    total = len(plan.contexts) * plan.decode_tokens
    with progress.task("Profiling decode steps", total=total, unit="tokens") as task:
        found = apart(ours.profile, order, task)
    points = [dataclasses.replace(p, breakdown=b) for p, b in zip(curve.points, found, strict=True)]
    return dataclasses.replace(curve, points=tuple(points))


def _theirs(options: BenchOptions, checkpoint: Path, plan: Sweep, progress: Progress) -> Curve:
    order = peer.PeerOrder(checkpoint, options.reference_dtype, options.threads, plan)
    with progress.task("Measuring transformers", total=plan.tokens, unit="tokens") as task:
        return apart(peer.measure_transformers, order, task)


def _facts(options: BenchOptions, info: ArtifactInfo) -> dict[str, Any]:
    """What the numbers depend on; no paths but those that were given."""
    return {
        "date": f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}",
        "artifact": str(options.artifact),
        "recipe": info.recipe,
        "target": info.target,
        "kv_cache": info.kv_cache,
        "compute": info.compute,
        "engine": options.run_with.engine,
        "provider": None if options.run_with.engine is not None else options.run_with.provider or "cpu",
        "model": {
            "layers": info.config.num_hidden_layers,
            "global_layers": sum(not layer.chunked for layer in info.config.layers),
            "chunk": info.config.attention_chunk_size,
            "positions": info.config.max_position_embeddings,
        },
        "threads": options.threads,
        "decode_tokens": options.decode_tokens,
        "synthetic": options.synthetic,
        "machine": _machine(),
        "versions": {"l4convert": __version__, "python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    """The processor, its cores, the memory, and how busy others keep it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": round(os.getloadavg()[0], 2),
    }
