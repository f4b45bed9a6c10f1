"""From checkpoint to artifact: the only place where the order of phases lives."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.names import expected_tensors
from l4convert.emit import check_destination, source_digests, write_artifact
from l4convert.emit.plan import WEIGHTS_FILE, plan_weights
from l4convert.emit.write import MODEL_FILE, serialize_model
from l4convert.errors import InputError, UsageError
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES, Pass, PassReport
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.quantization.recipe import Recipe, load_recipe, unused_rules
from l4convert.runtime.client_files import client_files
from l4convert.targets import TARGETS, Target

__all__ = ["ConversionPlan", "ConvertOptions", "ConvertResult", "PassReport", "convert", "plan_conversion"]


@dataclass(frozen=True)
class ConvertOptions:
    """What ``l4convert convert`` is asked for; field by field the options of that command."""

    checkpoint: Path
    output: Path
    target: str = "cpu"
    recipe: str = "int4"
    block_size: int | None = None
    kv_cache: str = "growing"
    verify_passes: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        passes: One report for each pass that ran, in order.
        bytes, tensors: Size and number of the tensors in the weights file.
        seconds: Wall time of the whole conversion.
    """

    output: Path
    target: str
    recipe: str
    kv_cache: str
    passes: tuple[PassReport, ...]
    bytes: int
    tensors: int
    seconds: float


@dataclass(frozen=True)
class ConversionPlan:
    """What would be written: file name to bytes, of all files but the manifest, which holds digests of the others."""

    passes: tuple[PassReport, ...]
    files: Mapping[str, int]
    bytes: int
    tensors: int


class _Conversion:
    """A conversion that was checked and lowered, and of which nothing was written yet."""

    def __init__(self, options: ConvertOptions, progress: Progress) -> None:
        self.target = _target(options)
        check_destination(options.output, options.overwrite, [options.checkpoint])
        self.recipe = load_recipe(options.recipe, options.block_size)
        self.checkpoint = open_checkpoint(options.checkpoint)
        _check_recipe(self.recipe, self.checkpoint)
        kv_cache: Any = options.kv_cache  # checked against the target's list
        self.model = build_decoder(self.checkpoint.config, self.checkpoint.tensors, self.checkpoint.experts, kv_cache)
        passes = (*CANONICAL_PASSES, *self.target.lowering)
        self.reports = tuple(self.run_pass(p, options, progress) for p in passes)
        self.plan = plan_weights(self.model)
        self.tensor_bytes = sum(tensor.nbytes for tensor in self.plan.tensors)
        self.tensor_count = sum(1 for _ in self.plan.tensors)

    def run_pass(self, graph_pass: Pass, options: ConvertOptions, progress: Progress) -> PassReport:
        if not options.verify_passes:
            return graph_pass(self.model, self.recipe)
        from l4convert.graph_passes.verification import verified

        return verified(graph_pass, self.model, self.recipe, self.checkpoint.config, options.kv_cache, progress)


def convert(options: ConvertOptions, progress: Progress = NO_PROGRESS) -> ConvertResult:
    """Convert a checkpoint into an artifact.

    Raises:
        UsageError: Unknown target, recipe or cache form, or an output folder that is in use.
        InputError: The checkpoint or recipe is not usable, or the disk is not large enough.
        CheckFailed: ``verify_passes`` was asked for and a pass changed what the graph computes.
    """
    start = time.monotonic()
    conversion = _Conversion(options, progress)
    checkpoint = conversion.checkpoint
    write_artifact(
        conversion.model,
        options.output,
        sidecars=checkpoint.sidecars,
        extra_files=client_files(checkpoint.config, options.kv_cache, checkpoint.sidecars),
        manifest=_manifest(conversion, options, progress),
        overwrite=options.overwrite,
        progress=progress,
        checkpoint=checkpoint.path,
    )
    return ConvertResult(
        output=options.output,
        target=conversion.target.name,
        recipe=conversion.recipe.name,
        kv_cache=options.kv_cache,
        passes=conversion.reports,
        bytes=conversion.tensor_bytes,
        tensors=conversion.tensor_count,
        seconds=time.monotonic() - start,
    )


def plan_conversion(options: ConvertOptions) -> ConversionPlan:
    """What :func:`convert` would write; no weight is read and nothing is written. Raises as it does."""
    conversion = _Conversion(options, NO_PROGRESS)
    files = {
        WEIGHTS_FILE: conversion.plan.total_bytes,
        MODEL_FILE: len(serialize_model(conversion.model, conversion.plan)),
    }
    files |= {path.name: path.stat().st_size for path in conversion.checkpoint.sidecars}
    written = client_files(conversion.checkpoint.config, options.kv_cache, conversion.checkpoint.sidecars)
    files |= {name: len(text.encode()) for name, text in written.items()}
    return ConversionPlan(conversion.reports, files, conversion.tensor_bytes, conversion.tensor_count)


def _target(options: ConvertOptions) -> Target:
    if options.target not in TARGETS:
        raise UsageError(f"unknown target {options.target!r}", f"known targets: {', '.join(TARGETS)}")
    target = TARGETS[options.target]
    if options.kv_cache not in target.kv_caches:
        known = ", ".join(target.kv_caches)
        raise UsageError(f"target {target.name} has no {options.kv_cache!r} KV cache", f"it has: {known}")
    return target


def _check_recipe(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Experts are quantized after they were fused, so the names that count are those of stacked ones."""
    unused = unused_rules(recipe, expected_tensors(checkpoint.config, "stacked"))
    if recipe.rules and len(unused) == len(recipe.rules):
        raise InputError(
            f"recipe {recipe.name}: no rule matches any tensor of {checkpoint.path}",
            "patterns are matched against the names of `l4convert inspect CKPT --tensors`, with experts stacked:"
            " ...experts.gate_up_proj and ...experts.down_proj",
        )


def _manifest(conversion: _Conversion, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    checkpoint = conversion.checkpoint
    return {
        "source": {"format": checkpoint.format, "files": source_digests(checkpoint.files, progress)},
        "config": dataclasses.asdict(checkpoint.config),
        "target": conversion.target.name,
        "recipe": conversion.recipe.to_dict(),
        "kv_cache": options.kv_cache,
        "passes": [
            {"name": r.name, "fired": r.fired, "skipped": dict(Counter(reason for _, reason in r.skipped))}
            for r in conversion.reports
        ],
    }
