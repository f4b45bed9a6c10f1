"""Run the segments one after the other in ONNX Runtime and compare with the whole graph, before anything is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from l4convert.emit.write import MODEL_FILE
from l4convert.engine.jobs import BuildPlan
from l4convert.engine.network import is_cache
from l4convert.engine.segments import HIDDEN_INPUT, HIDDEN_OUTPUT
from l4convert.errors import CheckFailed, InputError, backend_missing
from l4convert.progress import Progress
from l4convert.runtime.cpu_form import to_cpu_form
from l4convert.runtime.session import SETTINGS

#: Largest |difference| of an output, relative to its largest |value|. The same nodes run on the same numbers; only
#: ONNX Runtime's choice of what to fuse may differ at a cut.
TOLERANCE = 1e-6
# Slots of the caches, and new tokens of the two calls: a prefill and a decode step.
_SLOTS = 16
_CALLS = (7, 1)
_FOLDER_SETTING = "session.model_external_initializers_file_folder_path"
Arrays = dict[str, np.ndarray]


def check_segments(plan: BuildPlan, progress: Progress) -> None:
    """Compare logits and caches of the chain of segments with the whole graph's, in a prefill and a decode call.

    Raises:
        CheckFailed: They differ.
        InputError: ONNX Runtime cannot run a graph.
        BackendMissing: onnxruntime is not installed.
    """
    folder = plan.out / MODEL_FILE
    with progress.task("Checking segments", total=len(plan.segments) + 1, unit="graphs") as task:
        expected = _calls([plan.whole], folder, plan.config.vocab_size, task.advance)
        actual = _calls(list(plan.segments), folder, plan.config.vocab_size, task.advance)
    for name, values in expected.items():
        _compare(name, values, actual[name])


def _compare(name: str, expected: np.ndarray, actual: np.ndarray) -> None:
    if not np.isfinite(actual).all():
        raise CheckFailed(f"segments: {name} is not finite")
    difference = float(np.abs(actual - expected).max(initial=0.0))
    limit = TOLERANCE * float(np.abs(expected).max(initial=0.0))
    if not difference <= limit:
        raise CheckFailed(
            f"segments: {name} differs from the whole graph's by {difference:.3g}, more than {limit:.3g}",
            "build it as one engine, without --layers-per-engine",
        )


def _calls(models: list[onnx.ModelProto], weights: Path, vocabulary: int, advance: Any) -> Arrays:
    """Logits and caches after each call of a chain of graphs, in float32; one graph is in memory at a time."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, sum(_CALLS)))
    hidden: list[np.ndarray | None] = [None] * len(_CALLS)
    results: Arrays = {}
    for model in models:
        session = _load(model, weights)
        caches = {value.name: _empty(value) for value in model.graph.input if is_cache(value.name)}
        done = 0
        for call, count in enumerate(_CALLS):
            feeds: Arrays = {"attention_mask": np.ones((1, done + count), np.int64), **caches}
            if hidden[call] is None:
                feeds["input_ids"] = ids[:, done : done + count]
            else:
                feeds[HIDDEN_INPUT] = hidden[call]
            outputs = _run(session, feeds, weights)
            hidden[call] = outputs.pop(HIDDEN_OUTPUT, None)
            caches = {name: outputs[name.replace("past_key_values.", "present.")] for name in caches}
            results |= {f"call {call}: {name}": np.asarray(value, np.float32) for name, value in outputs.items()}
            done += count
        advance(1)
    return results


def _load(model: onnx.ModelProto, weights: Path) -> Any:
    """A session on the CPU; ``weights``: model.onnx, beside which the weights are."""
    try:
        import onnxruntime
    except ImportError as error:
        raise backend_missing("onnxruntime") from error
    import onnx_ir as ir

    rewritten = ir.from_proto(model)
    to_cpu_form(rewritten)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors become exceptions, and are not printed as well
    for key, value in {**SETTINGS, "session.disable_quant_qdq": "1", _FOLDER_SETTING: str(weights.parent)}.items():
        options.add_session_config_entry(key, value)
    content = ir.to_proto(rewritten).SerializeToString()
    return _reported(
        lambda: onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]), weights
    )


def _run(session: Any, feeds: Arrays, weights: Path) -> Arrays:
    taken = {value.name for value in session.get_inputs()}
    values = _reported(lambda: session.run(None, {k: v for k, v in feeds.items() if k in taken}), weights)
    return dict(zip([value.name for value in session.get_outputs()], values, strict=True))


def _reported(action: Callable[[], Any], weights: Path) -> Any:
    try:
        return action()
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        reason = " ".join(str(error).split())[:240]
        raise InputError(
            f"{weights}: ONNX Runtime cannot run a segment: {reason}", "--skip-segment-check builds without this check"
        ) from error


def _empty(cache: onnx.ValueInfoProto) -> np.ndarray:
    """A cache of the check's own length, for a batch of one."""
    dims = cache.type.tensor_type.shape.dim
    dtype = onnx.helper.tensor_dtype_to_np_dtype(cache.type.tensor_type.elem_type)
    return np.zeros((1, dims[1].dim_value, min(_SLOTS, dims[2].dim_value), dims[3].dim_value), dtype)
