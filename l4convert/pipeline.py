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

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.adapters import AppliedAdapter
from l4convert.checkpoint.parameters import parameter_counts
from l4convert.checkpoint.prequantized import stored_bytes
from l4convert.checkpoint.text import is_address
from l4convert.checkpoint.traffic import TRAFFIC, Traffic
from l4convert.conversion import Conversion
from l4convert.emit import Filling, adapter_digests, source_digests, write_artifact
from l4convert.emit.memory import parse_size
from l4convert.emit.plan import WEIGHTS_FILE
from l4convert.emit.write import MODEL_FILE, manifest_reserve, serialize_model
from l4convert.graph_passes import PassReport
from l4convert.options import ConvertOptions, HowOptions, PlanOptions
from l4convert.planning import ConversionPlan, TimePlan
from l4convert.planning.disk import existing_parent, plan_disk
from l4convert.planning.estimate import estimate_time
from l4convert.planning.memory import plan_memory
from l4convert.planning.serving import plan_serving
from l4convert.planning.sharing import SharingPlan
from l4convert.planning.tensors import TensorPlan, tensor_plans
from l4convert.planning.tokens import parse_context
from l4convert.planning.use import Artifact, ServingPlan, Wanted
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.quantization.kv import KvScheme
from l4convert.runtime.calibration_text import CalibrationText
from l4convert.runtime.client_files import client_files

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


@dataclass(frozen=True)
class ConvertResult:
    """What was written.

    Attributes:
        passes: One report for each pass that ran, in order.
        bytes, tensors: Size and number of the tensors in the weights file.
        adapters: What was merged into the checkpoint's weights.
        kv_scheme: How the caches are quantized; None: they are not.
        calibration: The text that their scales were found on.
        sharing: What stays in files of the checkpoint, where that was asked for; not counted in the others.
        resumed_bytes: How many of the bytes an earlier run had written.
        machines: How many machines computed weights.
        traffic: What came over the network, where the checkpoint is on the hub.
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
    adapters: tuple[AppliedAdapter, ...] = ()
    traffic: Traffic | None = None


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
    adapters = tuple(folder.absolute() for folder in options.adapters)
    options = dataclasses.replace(options, adapters=adapters)
    if not is_address(options.checkpoint):
        options = dataclasses.replace(options, checkpoint=options.checkpoint.absolute())
    with connected(address) as cluster:
        return _convert(options, progress, cluster)


def _convert(options: ConvertOptions, progress: Progress, cluster: Cluster | None) -> ConvertResult:
    start, before = time.monotonic(), TRAFFIC.now()
    filling = dataclasses.replace(_filling(options), cluster=cluster)
    conversion = Conversion(options, progress)
    checkpoint, calibration = conversion.checkpoint, conversion.calibration()
    resumed: list[int] = []
    write_artifact(
        conversion.model,
        options.output,
        sidecars=checkpoint.sidecars,
        extra_files={**checkpoint.generated, **_client_files(conversion)},
        manifest=_manifest(conversion, options, progress),
        overwrite=options.overwrite,
        share_weights=options.share_weights,
        progress=progress,
        checkpoint=checkpoint.path,
        sources=checkpoint.files,
        keep_clear_of=[adapter.path for adapter in checkpoint.adapters],
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
        adapters=checkpoint.adapters,
        traffic=None if checkpoint.hub is None else TRAFFIC.now() - before,
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
    before = TRAFFIC.now()
    conversion = Conversion(options, NO_PROGRESS)
    checkpoint, weights = conversion.checkpoint, conversion.plan
    files = _planned_files(conversion)
    table = tuple(tensor_plans(conversion.model, weights, conversion.recipe))
    parameters, active = parameter_counts(checkpoint.config, checkpoint.tensors)
    # Before the measurement, which takes memory of its own.
    memory = plan_memory(weights, conversion.recipe, _filling(options), _source_bytes(checkpoint))
    return ConversionPlan(
        source=checkpoint.title,
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
        adapters=checkpoint.adapters,
        time=_estimate(conversion, memory.jobs) if measure else None,
        serving=_serving(conversion, table) if isinstance(options, PlanOptions) else None,
        traffic=None if checkpoint.hub is None else TRAFFIC.now() - before,
    )


def _serving(conversion: Conversion, table: tuple[TensorPlan, ...]) -> ServingPlan | None:
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


def _planned_files(conversion: Conversion) -> dict[str, int]:
    checkpoint = conversion.checkpoint
    files = {
        WEIGHTS_FILE: conversion.plan.total_bytes,
        MODEL_FILE: len(serialize_model(conversion.model, conversion.plan)),
    }
    files |= {path.name: path.stat().st_size for path in checkpoint.sidecars}
    files |= {name: len(content) for name, content in checkpoint.generated.items()}
    return files | {name: len(text.encode()) for name, text in _client_files(conversion).items()}


def _client_files(conversion: Conversion) -> dict[str, str]:
    checkpoint, recipe = conversion.checkpoint, conversion.recipe
    return client_files(
        checkpoint.config,
        conversion.kv_cache,
        checkpoint.sidecars,
        conversion.target.name,
        recipe.kv_cache,
        checkpoint.generated,
    )


def _filling(options: HowOptions) -> Filling:
    limit = None if options.memory_limit is None else parse_size(options.memory_limit)
    return Filling(options.jobs, limit, options.restart)


def _source_bytes(checkpoint: Checkpoint) -> int:
    return sum(stored_bytes(tensor) for tensor in checkpoint.tensors.values())


def _estimate(conversion: Conversion, jobs: int) -> TimePlan | None:
    """None where the disk does not take even the measurement."""
    out = conversion.options.output
    folder = None if out is None else existing_parent(out)
    threads = max(1, min(jobs, len(os.sched_getaffinity(0))))
    try:
        return estimate_time(conversion.plan, conversion.sample(), conversion.recipe, threads, folder)
    except OSError:
        return None


def _adapters(adapters: Sequence[AppliedAdapter], progress: Progress) -> dict[str, Any]:
    """What the manifest says of them; nothing where there are none."""
    if not adapters:
        return {}
    with progress.task("Identifying the adapters", total=len(adapters), unit="adapters") as task:
        entries = []
        for adapter in adapters:
            entries.append({**adapter.to_dict(), "files": adapter_digests(adapter)})
            task.advance(1)
    return {"adapters": entries}


def _source(checkpoint: Checkpoint, progress: Progress) -> dict[str, Any]:
    return {
        "format": checkpoint.format,
        **({} if checkpoint.quantization is None else {"quantization": checkpoint.quantization}),
        **({} if checkpoint.hub is None else {"hub": dataclasses.asdict(checkpoint.hub)}),
        "files": source_digests(checkpoint.files, progress),
    }


def _manifest(conversion: Conversion, options: ConvertOptions, progress: Progress) -> dict[str, Any]:
    checkpoint = conversion.checkpoint
    return {
        "source": _source(checkpoint, progress),
        **_adapters(checkpoint.adapters, progress),
        "config": dataclasses.asdict(checkpoint.config),
        "target": conversion.target.name,
        "recipe": conversion.recipe.to_dict(),
        "kv_cache": conversion.kv_cache,
        **({} if conversion.text is None else {"calibration": conversion.text.to_dict()}),
        "compute": conversion.compute,
        "calls": conversion.target.calls,
        "passes": [
            {
                "name": r.name,
                "fired": r.fired,
                "skipped": dict(Counter(reason for _, reason in r.skipped)),
                **({"notes": dict(Counter(remark for _, remark in r.notes))} if r.notes else {}),
            }
            for r in conversion.reports
        ],
    }
