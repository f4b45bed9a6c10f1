"""One engine: its builder runs in a process of its own, its plan is put in place and recorded when it is whole."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from l4convert import errors
from l4convert.emit.engines import TIMING_CACHE, forget_engine, record_engine
from l4convert.emit.staging import reported
from l4convert.emit.write import MODEL_FILE
from l4convert.engine.backend import import_environment
from l4convert.engine.jobs import EngineJob
from l4convert.engine.monitor import TOTAL
from l4convert.engine.plan_file import plan_file, publish
from l4convert.engine.worker import WorkOrder
from l4convert.errors import InputError, L4Error, UsageError
from l4convert.progress import Progress, Task, format_amount


def compile_engine(out: Path, job: EngineJob, target: str, progress: Progress) -> tuple[dict[str, Any], int]:
    """Build one engine, put its plan in place and record it in the artifact's manifest.

    Ctrl-C, a failing disk or a failing build leave no plan; what was there before the build stays there.

    Returns:
        The engine's entry in the manifest, and the most bytes of memory that the builder's process had.

    Raises:
        InputError: The builder refuses the graph or crashes, or the disk fails; the hint names the log.
        UsageError: The plan is larger than the GPU's memory; or another process is building the same engine.
        BackendMissing: The builder does not load.
    """
    path = out / job.path
    with reported(f"{path.parent}: cannot be created"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with plan_file(path) as descriptor, progress.task(f"Building {job.title}", total=TOTAL, unit="%") as task:
        order = WorkOrder(
            target=target,
            title=job.title,
            model=job.model.SerializeToString(),
            model_path=str(out / MODEL_FILE),
            sm=job.hardware.sm,
            shapes=job.shapes(),
            plan=descriptor,
            log=str(path.with_suffix(".log")),
            timings=str(path.parent / TIMING_CACHE),
            plugins=None if job.plugins is None else str(job.plugins.path),
        )
        result = _run(order, task)
        peak = result.pop("peak_memory")
        entry = {**job.inputs, **result}
        if job.plugins is not None:
            entry["plugins_path"] = str(job.plugins.path)
        _require_fit(job, entry["bytes"])
        with reported(f"{path}: cannot be written"):
            forget_engine(out, job.path)  # so that no moment has an entry that describes another plan
            publish(path)
            record_engine(out, entry)
    return entry, peak


def _run(order: WorkOrder, task: Task) -> dict[str, Any]:
    """Let a worker do an order; it is gone when this returns or raises."""
    Path(order.log).unlink(missing_ok=True)
    with reported(f"{order.log}: cannot be written"), Path(order.log).open("ab") as log:  # the worker has it open twice
        worker = subprocess.Popen(
            [sys.executable, "-c", "from l4convert.engine.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[order.plan],
            env=import_environment(),
        )
    try:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with worker.stdin as pipe:
                pickle.dump(order, pipe)
        except BrokenPipeError:
            pass  # it ended at once; its exit is looked at below
        result = _follow(worker.stdout, task)
        code = worker.wait()
    finally:
        worker.kill()
        worker.wait()
    if result is None:
        raise InputError(f"{order.title}: the builder {_ending(code)}", f"the end of {order.log} may tell why")
    return result


def _follow(messages: IO[bytes], task: Task) -> dict[str, Any] | None:
    """Show the progress of a worker until it has nothing more to say; its result, or None where it told none."""
    result: dict[str, Any] | None = None
    with messages:
        for line in messages:
            [(kind, value)] = json.loads(line).items()
            if kind == "error":
                raise _error(*value)
            if kind == "result":
                result = value
            elif kind == "update":
                task.update(value)
            else:
                task.advance(value)
    return result


def _error(kind: str, message: str, hint: str | None) -> L4Error:
    found = getattr(errors, kind, L4Error)
    error = found(message, hint)
    assert isinstance(error, L4Error)
    return error


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
    memory = ": out of memory?" if -code == signal.SIGKILL else ""
    return f"crashed ({name}{memory})"


def _require_fit(job: EngineJob, size: int) -> None:
    memory = job.hardware.memory_bytes
    if memory is not None and size + job.caches_bytes > memory:
        raise UsageError(
            f"{job.title}: the plan has {format_amount(size, 'B')}, its caches"
            f" {format_amount(job.caches_bytes, 'B')}, the GPU {format_amount(memory, 'B')}",
            "lower --max-context or --max-batch, or cut the model with --layers-per-engine",
        )
