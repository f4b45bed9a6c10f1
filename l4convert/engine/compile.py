"""One engine: parse the graph, configure the builder, build, and stream the plan to the disk."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import and_more
from l4convert.emit.engines import PARTIAL_SUFFIX, TIMING_CACHE, forget_engine, record_engine
from l4convert.emit.staging import reported
from l4convert.emit.write import MODEL_FILE
from l4convert.engine.backend import Backend, set_capability
from l4convert.engine.jobs import EngineJob
from l4convert.engine.log import BuildLog, make_logger, native_output
from l4convert.engine.monitor import TOTAL, Steps, make_monitor
from l4convert.engine.plan_file import PlanFile, make_writer, plan_file, publish
from l4convert.errors import InputError, UsageError
from l4convert.progress import Progress, format_amount

# TF32 rounds the factors of float32 products to 10 bits. What the graph computes in float32 (the router's choice of
# experts, rotations, logits) is in float32 because bfloat16 was not exact enough, so builders must not undo that.
_CLEARED_FLAGS = ("TF32",)
_BLOCK_BYTES = 64 << 20
_POLL_SECONDS = 0.1


def compile_engine(out: Path, job: EngineJob, backend: Backend, progress: Progress) -> dict[str, Any]:
    """Build one engine, put its plan in place and record it in the artifact's manifest.

    Ctrl-C, a failing disk or a failing build leave no plan; what was there before the build stays there.

    Returns:
        The engine's entry in the manifest.

    Raises:
        InputError: The builder refuses the graph, or the disk fails; the hint names the log.
        UsageError: The plan is larger than the GPU's memory; or another process is building the same engine.
    """
    path = out / job.path
    with reported(f"{path.parent}: cannot be created"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        plan_file(path) as plan,
        reported(f"{path}: cannot be written"),
        BuildLog(path.with_suffix(".log")) as log,
        progress.task(f"Building {job.title}", total=TOTAL, unit="%") as task,
        native_output(log.path),
    ):
        cancelled = threading.Event()
        steps = Steps(task, f"Building {job.title}", cancelled)
        flags = _run(out, job, backend, log, steps, plan, cancelled)
        _require_fit(job, plan)
        entry = {
            **job.inputs,
            "bytes": plan.size,
            "sha256": plan.sha256,
            "builder": backend.as_dict(),
            "flags": flags,
            "scratch_bytes": log.scratch_bytes,
            "weights_bytes": log.weights_bytes,
        }
        forget_engine(out, job.path)  # so that no moment has an entry that describes another plan
        publish(path)
        record_engine(out, entry)
    return entry


def _run(
    out: Path,
    job: EngineJob,
    backend: Backend,
    log: BuildLog,
    steps: Steps,
    plan: PlanFile,
    cancelled: threading.Event,
) -> list[str]:
    """Drive the builder; returns the names of the flags that it had."""
    module, logger = backend.module, make_logger(backend.module, log)
    builder = module.Builder(logger)
    network = builder.create_network(_network_flags(module))
    parser = module.OnnxParser(network, logger)
    _parse(parser, job, out / MODEL_FILE, log)
    config, monitor = builder.create_builder_config(), make_monitor(module, steps)
    config.progress_monitor = monitor
    for name in _CLEARED_FLAGS:
        config.clear_flag(getattr(module.BuilderFlag, name))
    set_capability(backend, config, job.hardware)
    for shapes in job.shapes():
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    cache = (out / job.path).parent / TIMING_CACHE
    _load_timings(config, cache)
    done = _in_thread(lambda: _serialize(module, builder, network, config, plan), cancelled)
    if plan.error is not None:
        raise plan.error
    if not done or not plan.size:
        raise InputError(f"{job.title}: the builder failed: {log.reason()}", f"its log is {log.path}")
    _save_timings(config, cache)
    return [name for name, flag in module.BuilderFlag.__members__.items() if config.get_flag(flag)]


def _network_flags(module: Any) -> int:
    """Types are those of the graph, not the builder's choice: always so in TensorRT-RTX and TensorRT 11, a flag in 10."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, job: EngineJob, path: Path, log: BuildLog) -> None:
    """Parse the graph; ``path`` is where its external weights are looked for."""
    if parser.parse(job.model.SerializeToString(), str(path)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    first = _describe(errors[0]) if errors else log.reason()
    raise InputError(f"{path}: {first}{and_more(len(errors) - 1)}", f"its log is {log.path}")


def _describe(error: Any) -> str:
    node, kind = error.node_name(), error.node_operator()
    where = f"node {node} ({kind}): " if node or kind else ""
    return f"{where}the parser refuses it: {' '.join(str(error.desc()).split())[:400]}"


def _serialize(module: Any, builder: Any, network: Any, config: Any, plan: PlanFile) -> bool:
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, make_writer(module, plan)))
    memory = builder.build_serialized_network(network, config)  # TensorRT before streams: the plan in memory, too
    if memory is None:
        return False
    view = memoryview(memory).cast("B")
    for start in range(0, len(view), _BLOCK_BYTES):
        plan.write(view[start : start + _BLOCK_BYTES])
    return True


def _in_thread(build: Callable[[], bool], cancelled: threading.Event) -> bool:
    """Run a build in a thread of its own, so that this one can be interrupted: Ctrl-C asks the builder to stop.

    Builders let go of Python's lock while they work, and print and forget what is raised in a callback.
    """
    outcome: list[bool | BaseException] = []

    def run() -> None:
        try:
            outcome.append(build())
        except BaseException as error:  # carried over to the waiting thread
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
    except BaseException:
        cancelled.set()
        thread.join()
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _require_fit(job: EngineJob, plan: PlanFile) -> None:
    memory = job.hardware.memory_bytes
    if memory is not None and plan.size + job.caches_bytes > memory:
        raise UsageError(
            f"{job.title}: the plan has {format_amount(plan.size, 'B')}, its caches"
            f" {format_amount(job.caches_bytes, 'B')}, the GPU {format_amount(memory, 'B')}",
            "lower --max-context or --max-batch, or cut the model with --layers-per-engine",
        )


def _load_timings(config: Any, path: Path) -> None:
    """Let the builder begin with the measurements of earlier builds; TensorRT-RTX takes none, and keeps none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX's
        for known in (path.read_bytes() if path.is_file() else b"", b""):
            if config.set_timing_cache(config.create_timing_cache(known), False):
                return


def _save_timings(config: Any, path: Path) -> None:
    """Keep the measurements. Of two machines that build for one GPU at once the last one's stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.get_timing_cache()
        if cache is None:
            return
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        partial.write_bytes(bytes(cache.serialize()))
    partial.replace(path)
