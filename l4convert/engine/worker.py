"""The process that a builder runs in, started by compile.py.

A builder may crash, prints its compiler's program where it fails, cannot be interrupted while it compiles, and gives
no memory back for certain. In a process of its own none of that reaches the user's: what it prints ends in the log, it
is ended by a signal, and its peak memory is its own.

It reads a pickled :class:`WorkOrder` from stdin and writes one JSON object a line to what was stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import and_more
from l4convert.emit.engines import PARTIAL_SUFFIX
from l4convert.emit.memory import peak_resident_bytes
from l4convert.engine.backend import load_module, set_capability
from l4convert.engine.log import BuildLog, make_logger
from l4convert.engine.monitor import Steps, make_monitor
from l4convert.engine.plan_file import PlanWriter, make_writer
from l4convert.engine.plugins import allow_aliases, load_library
from l4convert.errors import InputError, L4Error

# TF32 rounds the factors of float32 products to 10 bits. What the graph computes in float32 (the router's choice of
# experts, rotations, logits) is in float32 because bfloat16 was not exact enough, so builders must not undo that.
_CLEARED_FLAGS = ("TF32",)
_BLOCK_BYTES = 64 << 20
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Shapes = dict[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class WorkOrder:
    """One engine to build.

    Attributes:
        target: Decides the builder.
        title: How messages name the engine.
        model: The graph, serialized; ``model_path``: beside which its weights are.
        sm: Compute capability, 89 for 8.9.
        shapes: For each optimization profile: least, usual and most shape of each input.
        plan: Open descriptor to write the plan to.
        log: Path of the log; ``timings``: of the timing cache.
        plugins: Path of the plugin library; None where the graph needs none.
    """

    target: str
    title: str
    model: bytes
    model_path: str
    sm: int
    shapes: list[Shapes]
    plan: int
    log: str
    timings: str
    plugins: str | None = None


class _Reporter:
    """Tells the parent process; the builder's threads may use it at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        line = json.dumps({kind: value}).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]

    def advance(self, amount: float) -> None:
        self.send("advance", amount)

    def update(self, description: str) -> None:
        self.send("update", description)


def main() -> None:
    """Do the order on stdin and report what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # not to go on building for nobody
    order = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    assert isinstance(order, WorkOrder)
    reporter = _Reporter(os.dup(1))
    os.dup2(2, 1)  # the log: nothing that native code prints may come between the messages
    try:
        reporter.send("result", build(order, reporter))
    except L4Error as error:
        reporter.send("error", [type(error).__name__, error.message, error.hint])


def build(order: WorkOrder, reporter: Any) -> dict[str, Any]:
    """Build one engine.

    Returns:
        The part of its entry in the manifest that building tells, and under ``peak_memory`` bytes of this process.

    Raises:
        BackendMissing: The builder does not load.
        InputError: The builder refuses the graph, or the plan cannot be written.
    """
    module = load_module(order.target)
    with BuildLog(Path(order.log)) as log:
        plan = PlanWriter(order.plan)
        flags = _drive(order, module, log, Steps(reporter, f"Building {order.title}"), plan)
        return {
            "bytes": plan.size,
            "sha256": plan.sha256,
            "builder": {"name": module.__name__, "version": str(module.__version__)},
            "flags": flags,
            "scratch_bytes": log.scratch_bytes,
            "weights_bytes": log.weights_bytes,
            "peak_memory": peak_resident_bytes(),
        }


def _drive(order: WorkOrder, module: Any, log: BuildLog, steps: Steps, plan: PlanWriter) -> list[str]:
    """Parse, configure, build; returns the names of the builder's flags."""
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    if order.plugins is not None and not load_library(builder, order.plugins):
        raise InputError(f"{order.plugins}: TensorRT does not load it: {log.reason()}", f"its log is {log.path}")
    network = builder.create_network(_network_flags(module))
    parser = module.OnnxParser(network, logger)
    _parse(parser, order, log)
    _allow_decomposition(module, network)
    config, monitor = builder.create_builder_config(), make_monitor(module, steps)
    config.progress_monitor = monitor
    if order.plugins is not None:
        allow_aliases(module, config)
    for name in _CLEARED_FLAGS:
        config.clear_flag(getattr(module.BuilderFlag, name))
    set_capability(module, config, order.sm)
    for shapes in order.shapes:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    _load_timings(config, Path(order.timings))
    done = _serialize(module, builder, network, config, plan)
    if plan.error is not None:
        raise InputError(f"{order.title}: the plan cannot be written: {plan.error.strerror}") from plan.error
    if not done or not plan.size:
        raise InputError(f"{order.title}: the builder failed: {log.reason()}", f"its log is {log.path}")
    _save_timings(config, Path(order.timings))
    return [name for name, flag in module.BuilderFlag.__members__.items() if config.get_flag(flag)]


def _network_flags(module: Any) -> int:
    """Types are those of the graph, not the builder's choice: always in TensorRT-RTX and TensorRT 11, a flag in 10."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse(parser: Any, order: WorkOrder, log: BuildLog) -> None:
    if parser.parse(order.model, order.model_path):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    first = _describe(errors[0]) if errors else log.reason()
    raise InputError(f"{order.model_path}: {first}{and_more(len(errors) - 1)}", f"its log is {log.path}")


def _allow_decomposition(module: Any, network: Any) -> None:
    """Let attention be computed by several kernels where none does it alone: for small heads, say.

    TensorRT's parser does not ask for it, and without it the build fails.
    """
    kind = getattr(module.LayerType, "ATTENTION_INPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)) if kind is not None else ():
        if layer.type == kind:
            layer.__class__ = module.IAttentionInputLayer  # the bindings give the base class, and this is how to cast
            layer.attention.decomposable = True


def _describe(error: Any) -> str:
    node, kind = error.node_name(), error.node_operator()
    where = f"node {node} ({kind}): " if node or kind else ""
    return f"{where}the parser refuses it: {' '.join(str(error.desc()).split())[:400]}"


def _serialize(module: Any, builder: Any, network: Any, config: Any, plan: PlanWriter) -> bool:
    if hasattr(builder, "build_serialized_network_to_stream"):
        return bool(builder.build_serialized_network_to_stream(network, config, make_writer(module, plan)))
    memory = builder.build_serialized_network(network, config)  # TensorRT before streams: the plan in memory, too
    if memory is None:
        return False
    view = memoryview(memory).cast("B")
    for start in range(0, len(view), _BLOCK_BYTES):
        plan.write(view[start : start + _BLOCK_BYTES])
    return True


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
