"""``l4convert build``: engines of an artifact for several GPUs, in one run, resumable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.emit import read_manifest
from l4convert.emit.engines import engine_entries
from l4convert.engine.backend import Backend, find_backend, require_capability
from l4convert.engine.compile import compile_engine
from l4convert.engine.jobs import BuildOptions, BuildPlan, EngineJob, plan_build
from l4convert.engine.segment_check import check_segments
from l4convert.progress import NO_PROGRESS, Progress

__all__ = ["BuildOptions", "BuildPlan", "BuildResult", "BuiltEngine", "build_engines", "is_built", "plan_build"]


@dataclass(frozen=True)
class BuiltEngine:
    """One engine that is there now.

    Attributes:
        entry: Its entry in the manifest.
        bytes_per_weight: Bytes of the plan, less those of tensors that are not quantized, for each quantized weight;
            None where none is quantized.
        seconds: That building took; 0 where it was built already.
        peak_memory: Most bytes of memory that the builder's process had; 0 where it was built already.
        skipped: Whether it was built already.
    """

    entry: Mapping[str, Any]
    bytes_per_weight: float | None
    seconds: float
    peak_memory: int
    skipped: bool


@dataclass(frozen=True)
class BuildResult:
    """What a run did.

    Attributes:
        segments_checked: Whether segments were compared with the whole graph; None where there is one engine.
    """

    out: Path
    builder: Backend
    engines: tuple[BuiltEngine, ...]
    segments_checked: bool | None


def build_engines(options: BuildOptions, progress: Progress = NO_PROGRESS) -> BuildResult:
    """Build the engines that are not built yet.

    Raises:
        UsageError, InputError: See :func:`plan_build` and :func:`compile_engine`.
        BackendMissing: The builder is not installed; or onnxruntime, which the check of segments needs.
        CheckFailed: The segments compute something else than the whole graph.
    """
    plan = plan_build(options)
    backend = find_backend(plan.target)
    for job in plan.jobs:
        require_capability(backend, job.hardware)
    due = {job.path for job in plan.jobs if options.overwrite or not is_built(plan.out, job, backend)}
    several = len(plan.segments) > 1
    if several and due and options.check_segments:
        check_segments(plan, progress)
    engines = tuple(_engine(plan, job, progress, job.path in due) for job in plan.jobs)
    return BuildResult(plan.out, backend, engines, options.check_segments and bool(due) if several else None)


def is_built(out: Path, job: EngineJob, backend: Backend) -> bool:
    """Whether the manifest has this very engine, by this builder, and its plan is there."""
    entry = _entry(out, job.path)
    if entry is None or entry.get("builder") != backend.as_dict():
        return False
    path = out / job.path
    whole = path.is_file() and path.stat().st_size == entry["bytes"]
    return whole and all(entry.get(key) == value for key, value in job.inputs.items())


def _engine(plan: BuildPlan, job: EngineJob, progress: Progress, due: bool) -> BuiltEngine:
    begun = time.monotonic()
    entry, peak = compile_engine(plan.out, job, plan.target, progress) if due else (_entry(plan.out, job.path), 0)
    assert entry is not None
    seconds = time.monotonic() - begun if due else 0.0
    weights = job.facts.quantized_weights
    per_weight = (entry["bytes"] - job.facts.unquantized_bytes) / weights if weights else None
    return BuiltEngine(entry, per_weight, seconds, peak, skipped=not due)


def _entry(out: Path, path: str) -> dict[str, Any] | None:
    return next((entry for entry in engine_entries(read_manifest(out)) if entry["path"] == path), None)
