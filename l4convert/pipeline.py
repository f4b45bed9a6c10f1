"""From checkpoint to artifact: the only place where the order of phases lives."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from l4convert.calibrating import Calibration, calibration_of
from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import expected_tensors
from l4convert.checkpoint.parameters import parameter_counts
from l4convert.checkpoint.presets import preset_checkpoint
from l4convert.emit import Filling, check_destination, source_digests, write_artifact
from l4convert.emit.memory import parse_size
from l4convert.emit.plan import WEIGHTS_FILE, WeightsPlan, plan_weights
from l4convert.emit.write import MODEL_FILE, manifest_reserve, serialize_model
from l4convert.errors import InputError, UsageError
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES, Pass, PassReport
from l4convert.planning import ConversionPlan, TimePlan
from l4convert.planning.disk import existing_parent, plan_disk
from l4convert.planning.estimate import estimate_time, noise_tensors, sample_layers
from l4convert.planning.memory import plan_memory
from l4convert.planning.serving import plan_serving
from l4convert.planning.sharing import SharingPlan, plan_sharing
from l4convert.planning.tensors import TensorPlan, tensor_plans
from l4convert.planning.tokens import parse_context
from l4convert.planning.use import Artifact, ServingPlan, Wanted
from l4convert.planning.working import PREFILL_TOKENS
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.recipe import Recipe, load_recipe, unused_rules, with_kv_cache
from l4convert.runtime.calibration_text import DEFAULT_TOKENS, CalibrationText, read_calibration_text
from l4convert.runtime.client_files import client_files
from l4convert.targets import TARGETS, Target
from l4convert.targets.hardware import Hardware, hardware_names, load_hardware

if TYPE_CHECKING:
    from l4convert.emit.cluster import Cluster

__all__ = [
    "ConversionPlan",
    "ConvertOptions",
    "ConvertResult",
    "PassReport",
    "PlanOptions",
    "convert",
    "plan_conversion",
]


@dataclass(frozen=True, kw_only=True)
class _HowOptions:
    """How a checkpoint is converted, whether it is done or only planned.

    ``kv_cache`` and ``compute`` are the target's own where they are None. ``jobs`` and ``memory_limit`` (as "4G")
    change how fast the artifact is written, not one byte of it. ``kv_dtype``, ``kv_granularity`` and ``kv_layers`` go
    over the recipe's ``[kv_cache]`` table.
    """

    target: str = "cpu"
    recipe: str = "int4"
    block_size: int | None = None
    kv_cache: str | None = None
    kv_dtype: str | None = None
    kv_granularity: str | None = None
    kv_layers: str | None = None
    compute: str | None = None
    share_weights: bool = False
    verify_passes: bool = False
    overwrite: bool = False
    restart: bool = False
    jobs: int | None = None
    memory_limit: str | None = None


@dataclass(frozen=True)
class ConvertOptions(_HowOptions):
    """What ``l4convert convert`` is asked for; field by field the options of that command.

    ``cluster`` changes where the bytes are computed (:func:`l4convert.emit.cluster.connected`), not one of them.
    ``calibration`` is the text that quantized caches need, of which so many tokens are used.
    """

    checkpoint: Path
    output: Path
    cluster: str | None = None
    calibration: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS


@dataclass(frozen=True)
class PlanOptions(_HowOptions):
    """What ``l4convert plan`` is asked for: a checkpoint or a preset, how it would be converted, and its use.

    ``target`` may be a hardware profile, too: then the artifact is for its first runtime, and what fits is planned.
    ``context`` (as "1M"), ``batch``, ``prefill_tokens`` and ``tensor_parallel`` are those of
    :class:`l4convert.planning.use.Wanted`.
    """

    checkpoint: Path | None = None
    preset: str | None = None
    output: Path | None = None
    context: str | None = None
    batch: int = 1
    prefill_tokens: int = PREFILL_TOKENS
    tensor_parallel: int | None = None


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        passes: One report for each pass that ran, in order.
        bytes, tensors: Size and number of the tensors in the weights file.
        kv_scheme: How the caches are quantized; None: they are not.
        calibration: The text that their scales were found on.
        sharing: What stays in files of the checkpoint, where that was asked for; not counted in the others.
        resumed_bytes: How many of the bytes an earlier run had written.
        machines: How many machines computed weights.
        seconds: Wall time of the whole conversion.
    """

    output: Path
    target: str
    recipe: str
    kv_cache: str
    kv_scheme: KvScheme | None
    calibration: CalibrationText | None
    compute: str
    passes: tuple[PassReport, ...]
    bytes: int
    tensors: int
    sharing: SharingPlan | None
    resumed_bytes: int
    machines: int
    seconds: float


class _Conversion:
    """A conversion that was checked and lowered, and of which nothing was written yet."""

    def __init__(self, options: ConvertOptions | PlanOptions, progress: Progress) -> None:
        self.options = options
        self.target, self.hardware = _target(options)
        self.kv_cache = _choice(self.target, "KV cache", self.target.kv_caches, options.kv_cache)
        self.compute = _choice(self.target, "compute type", self.target.compute, options.compute)
        if options.output is not None:
            sources = [] if options.checkpoint is None else [options.checkpoint]
            check_destination(options.output, options.overwrite, sources)
        recipe = load_recipe(options.recipe, options.block_size, self.target.block_size)
        self.recipe = with_kv_cache(recipe, options.kv_dtype, options.kv_granularity, options.kv_layers)
        _check_kv_cache(self.recipe, self.target, options)
        self.checkpoint = _open(options)
        _check_recipe(self.recipe, self.checkpoint)
        self.text = _calibration_text(options, self.checkpoint)
        self.model = self.build(self.checkpoint)
        self.reports = tuple(self.run_pass(p, options, progress) for p in self.passes)
        self.plan = plan_weights(self.model, options.share_weights)
        self.sharing = plan_sharing(self.plan, options.output) if options.share_weights else None

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (*CANONICAL_PASSES, *self.target.lowering)

    def build(self, checkpoint: Checkpoint, kv_cache: str | None = None) -> ir.Model:
        form: Any = kv_cache or self.kv_cache  # both were checked against the target's lists
        compute: Any = self.compute
        return build_decoder(checkpoint.config, checkpoint.tensors, checkpoint.experts, form, compute)

    def calibration(self) -> Calibration | None:
        """How the scales of quantized caches are found; None where there are none.

        Raises:
            UsageError: There is no text to find them on.
        """
        scheme = self.recipe.kv_cache
        if scheme is None:
            return None
        if self.text is None:
            raise UsageError(
                f"caches in {scheme.dtype} need scales, which are found on a text",
                "give --calibration FILE, a text like those that the model will see",
            )
        self._require_quantized(scheme)
        form = "growing" if "growing" in self.target.kv_caches else self.kv_cache
        plain = self.build(self.checkpoint, form)
        recipe = dataclasses.replace(self.recipe, kv_cache=None)
        for graph_pass in self.passes:
            graph_pass(plain, recipe)
        compute: Any = self.compute
        return calibration_of(
            plain,
            config=self.checkpoint.config,
            compute=compute,
            form=form,
            cpu_form=self.compute == "bfloat16" or self.target.name == "cuda",
            share_weights=self.options.share_weights,
            scheme=scheme,
            text=self.text,
            quantized=self.plan,
        )

    def _require_quantized(self, scheme: KvScheme) -> None:
        """Refuse what the pass left alone although the recipe covers it."""
        report = next(report for report in self.reports if report.name == "quantize_kv_cache")
        if report.fired < sum(scheme.covers(layer.chunked) for layer in self.checkpoint.config.layers):
            where, reason = report.skipped[-1]
            raise UsageError(f"{where}: caches cannot be {scheme.dtype}: {reason}", "give another --kv-dtype")

    def sample(self) -> WeightsPlan:
        """The same conversion of one layer of each kind, with random weights."""
        config = self.checkpoint.config
        layers = tuple(config.layers[i] for i in sample_layers(layer.moe for layer in config.layers))
        config = dataclasses.replace(config, layers=layers)
        tensors: dict[str, LazyTensor] = noise_tensors(
            expected_tensors(config, self.checkpoint.experts), next(iter(self.checkpoint.tensors.values())).dtype
        )
        model = self.build(dataclasses.replace(self.checkpoint, config=config, tensors=tensors))
        for graph_pass in self.passes:
            graph_pass(model, self.recipe)
        return plan_weights(model)

    def run_pass(self, graph_pass: Pass, options: ConvertOptions | PlanOptions, progress: Progress) -> PassReport:
        if not options.verify_passes:
            return graph_pass(self.model, self.recipe)
        from l4convert.graph_passes.verification import Probes, verified

        probes = Probes(self.checkpoint.config, self.kv_cache, self.compute, self.target.calls == "in_place")
        return verified(graph_pass, self.model, self.recipe, probes, progress)


def convert(options: ConvertOptions, progress: Progress = NO_PROGRESS) -> ConvertResult:
    """Convert a checkpoint into an artifact.

    Raises:
        UsageError: Unknown target, recipe or cache form, an output folder that is in use or holds an unfinished run of
            other options, a memory limit that is too small, or weights that cannot be shared.
        InputError: The checkpoint or recipe is not usable, the checkpoint changed since an unfinished run, or the disk
            is not large enough.
        CheckFailed: ``verify_passes`` was asked for and a pass changed what the graph computes.
        BackendMissing: A cluster was asked for and Ray is not installed, or a machine lacks this version of l4convert.
        ClusterError: The cluster cannot be reached, fails, or does not share the file system.
    """
    address = options.cluster
    if address is None:
        return _convert(options, progress, None)
    from l4convert.emit.cluster import connected

    # The machines do not work in this folder. A cluster that is not there is told before anything takes long.
    options = dataclasses.replace(options, checkpoint=options.checkpoint.absolute())
    with connected(address) as cluster:
        return _convert(options, progress, cluster)


def _convert(options: ConvertOptions, progress: Progress, cluster: Cluster | None) -> ConvertResult:
    start = time.monotonic()
    filling = dataclasses.replace(_filling(options), cluster=cluster)
    conversion = _Conversion(options, progress)
    checkpoint, calibration = conversion.checkpoint, conversion.calibration()
    resumed: list[int] = []
    write_artifact(
        conversion.model,
        options.output,
        sidecars=checkpoint.sidecars,
        extra_files=_client_files(conversion),
        manifest=_manifest(conversion, options, progress),
        overwrite=options.overwrite,
        share_weights=options.share_weights,
        progress=progress,
        checkpoint=checkpoint.path,
        sources=checkpoint.files,
        filling=filling,
        on_resumed=resumed.append,
        finish=None if calibration is None else calibration.finish(conversion.model, progress),
    )
    return ConvertResult(
        output=options.output,
        target=conversion.target.name,
        recipe=conversion.recipe.name,
        kv_cache=conversion.kv_cache,
        kv_scheme=conversion.recipe.kv_cache,
        calibration=conversion.text,
        compute=conversion.compute,
        passes=conversion.reports,
        bytes=sum(tensor.nbytes for tensor in conversion.plan.tensors),
        tensors=sum(1 for _ in conversion.plan.tensors),
        sharing=conversion.sharing,
        resumed_bytes=sum(resumed),
        machines=1 if cluster is None else len(cluster.machines),
        seconds=time.monotonic() - start,
    )


def plan_conversion(options: ConvertOptions | PlanOptions, measure: bool = False) -> ConversionPlan:
    """What :func:`convert` would write, and what it would need; no weight is read and nothing is written.

    Args:
        options: A conversion, or the part of one that is known.
        measure: Estimate the time too, by computing and writing random tiles for about two seconds.

    Returns:
        The plan. Whether the disk is large enough is ``plan.disk.check()``'s to refuse, so that the plan can be shown.

    Raises:
        UsageError: As :func:`convert`; or both or neither of a checkpoint and a preset, or one that does not exist.
        InputError: As :func:`convert`, except for the disk.
    """
    conversion = _Conversion(options, NO_PROGRESS)
    checkpoint, weights = conversion.checkpoint, conversion.plan
    files = _planned_files(conversion)
    table = tuple(tensor_plans(conversion.model, weights, conversion.recipe))
    parameters, active = parameter_counts(checkpoint.config, checkpoint.tensors)
    # Before the measurement, which takes memory of its own.
    memory = plan_memory(weights, conversion.recipe, _filling(options), _source_bytes(checkpoint))
    return ConversionPlan(
        source=str(checkpoint.path),
        parameters=parameters,
        active_parameters=active,
        source_bytes=_source_bytes(checkpoint),
        output=options.output,
        target=conversion.target.name,
        recipe=conversion.recipe.name,
        kv_cache=conversion.kv_cache,
        compute=conversion.compute,
        passes=conversion.reports,
        table=table,
        files=files,
        sharing=conversion.sharing,
        disk=plan_disk(sum(files.values()) + manifest_reserve(weights), options.output),
        memory=memory,
        time=_estimate(conversion, memory.jobs) if measure else None,
        serving=_serving(conversion, table) if isinstance(options, PlanOptions) else None,
    )


def _serving(conversion: _Conversion, table: tuple[TensorPlan, ...]) -> ServingPlan | None:
    """None where neither hardware nor a use was named."""
    options, config = conversion.options, conversion.checkpoint.config
    assert isinstance(options, PlanOptions)  # convert has no such options
    asked = (options.context, options.tensor_parallel, conversion.hardware)
    if all(value is None for value in asked) and options.batch == 1:
        return None
    compute: Any = conversion.compute
    target, form = conversion.target, conversion.kv_cache
    artifact = Artifact(config, table, conversion.recipe, target.name, form, compute, target.kv_dtypes)
    context = None if options.context is None else parse_context(options.context, config.max_position_embeddings)
    use = Wanted(context, options.batch, options.prefill_tokens, options.tensor_parallel, conversion.hardware)
    return plan_serving(artifact, use)


def _planned_files(conversion: _Conversion) -> dict[str, int]:
    checkpoint = conversion.checkpoint
    files = {
        WEIGHTS_FILE: conversion.plan.total_bytes,
        MODEL_FILE: len(serialize_model(conversion.model, conversion.plan)),
    }
    files |= {path.name: path.stat().st_size for path in checkpoint.sidecars}
    return files | {name: len(text.encode()) for name, text in _client_files(conversion).items()}


def _client_files(conversion: _Conversion) -> dict[str, str]:
    checkpoint, recipe = conversion.checkpoint, conversion.recipe
    return client_files(
        checkpoint.config, conversion.kv_cache, checkpoint.sidecars, conversion.target.name, recipe.kv_cache
    )


def _filling(options: _HowOptions) -> Filling:
    limit = None if options.memory_limit is None else parse_size(options.memory_limit)
    return Filling(options.jobs, limit, options.restart)


def _source_bytes(checkpoint: Checkpoint) -> int:
    return sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def _estimate(conversion: _Conversion, jobs: int) -> TimePlan | None:
    """None where the disk does not take even the measurement."""
    out = conversion.options.output
    folder = None if out is None else existing_parent(out)
    threads = max(1, min(jobs, len(os.sched_getaffinity(0))))
    try:
        return estimate_time(conversion.plan, conversion.sample(), conversion.recipe, threads, folder)
    except OSError:
        return None


def _open(options: ConvertOptions | PlanOptions) -> Checkpoint:
    preset = options.preset if isinstance(options, PlanOptions) else None
    if (options.checkpoint is None) == (preset is None):
        given = "both were given" if preset is not None else "neither was given"
        raise UsageError(f"a checkpoint or a preset is needed: {given}", "give a folder, or --preset NAME")
    if preset is not None and options.share_weights:
        raise UsageError("a preset has no files in which weights could stay", "plan for a checkpoint")
    if options.checkpoint is not None:
        return open_checkpoint(options.checkpoint)
    assert preset is not None  # the other one is None
    return preset_checkpoint(preset)


def _target(options: ConvertOptions | PlanOptions) -> tuple[Target, Hardware | None]:
    """The target, and the hardware where that was named in a plan: then the target is its first runtime."""
    name = options.target
    if name in TARGETS:
        return TARGETS[name], None
    if not isinstance(options, PlanOptions):
        raise UsageError(f"unknown target {name!r}", f"known targets: {', '.join(TARGETS)}")
    if not name.endswith(".toml") and name not in hardware_names():
        known = f"targets: {', '.join(TARGETS)}; hardware: {', '.join(hardware_names())}, or your own FILE.toml"
        raise UsageError(f"unknown target {name!r}", known)
    hardware = load_hardware(name)
    return TARGETS[next(iter(hardware.runtimes), "cpu")], hardware


def _choice(target: Target, kind: str, known: Sequence[str], wanted: str | None) -> str:
    """What was asked for, or the target's default where nothing was."""
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise UsageError(f"target {target.name} has no {wanted!r} {kind}", f"it has: {', '.join(known)}")
    return wanted


def _check_recipe(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Experts are quantized after they were fused, so the names that count are those of stacked ones."""
    unused = unused_rules(recipe, expected_tensors(checkpoint.config, "stacked"))
    if recipe.rules and len(unused) == len(recipe.rules):
        raise InputError(
            f"recipe {recipe.name}: no rule matches any tensor of {checkpoint.path}",
            "patterns are matched against the names of `l4convert inspect CKPT --tensors`, with experts stacked:"
            " ...experts.gate_up_proj and ...experts.down_proj",
        )


def _check_kv_cache(recipe: Recipe, target: Target, options: ConvertOptions | PlanOptions) -> None:
    if recipe.kv_cache is None:
        if isinstance(options, ConvertOptions) and options.calibration is not None:
            raise UsageError(
                "--calibration is for quantized caches, and these are not", "give --kv-dtype, or leave it out"
            )
    elif recipe.kv_cache.dtype not in target.kv_dtypes:
        others = ", ".join(name for name, row in TARGETS.items() if recipe.kv_cache.dtype in row.kv_dtypes)
        raise UsageError(
            f"target {target.name} takes no key/value caches of {recipe.kv_cache.dtype}",
            f"give --kv-dtype none, or a target that does: {others}",
        )


def _calibration_text(options: ConvertOptions | PlanOptions, checkpoint: Checkpoint) -> CalibrationText | None:
    if not isinstance(options, ConvertOptions) or options.calibration is None:
        return None
    vocabulary = checkpoint.config.vocab_size
    return read_calibration_text(options.calibration, checkpoint.path, options.calibration_tokens, vocabulary)


def _manifest(conversion: _Conversion, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    checkpoint = conversion.checkpoint
    return {
        "source": {"format": checkpoint.format, "files": source_digests(checkpoint.files, progress)},
        "config": dataclasses.asdict(checkpoint.config),
        "target": conversion.target.name,
        "recipe": conversion.recipe.to_dict(),
        "kv_cache": conversion.kv_cache,
        **({} if conversion.text is None else {"calibration": conversion.text.to_dict()}),
        "compute": conversion.compute,
        "calls": conversion.target.calls,
        "passes": [
            {"name": r.name, "fired": r.fired, "skipped": dict(Counter(reason for _, reason in r.skipped))}
            for r in conversion.reports
        ],
    }
