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
from l4convert.errors import CheckFailed, InputError, backend_missing, summary_of
from l4convert.progress import Progress
from l4convert.runtime.cpu_form import to_cpu_form
from l4convert.runtime.loading import SETTINGS
from l4convert.runtime.ort_values import ort_value

#: Largest |difference| of an output, relative to its largest |value|. The same nodes run on the same numbers.
TOLERANCE = 1e-6
# Slots of the caches, and new tokens of the two calls: a prefill and a decode step.
_SLOTS = 16
_CALLS = (7, 1)
_WIDE = "/float32"
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


def _calls(models: list[onnx.ModelProto], weights: Path, vocabulary: int, advance: Callable[[float], None]) -> Arrays:
    """Logits and caches after each call of a chain of graphs, in float32; one graph is in memory at a time."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, sum(_CALLS)))
    starts = np.cumsum((0, *_CALLS[:-1]))
    # What the first graph reads in each call; then what each graph hands on to the next.
    handed: list[dict[str, Any]] = [
        {"input_ids": ort_value(ids[:, start : start + count])} for start, count in zip(starts, _CALLS, strict=True)
    ]
    results: Arrays = {}
    for model in map(_probe, models):
        session = _load(model, weights)
        caches = {value.name: ort_value(_empty(value)) for value in model.graph.input if is_cache(value.name)}
        for call, (start, count) in enumerate(zip(starts, _CALLS, strict=True)):
            mask = ort_value(np.ones((1, start + count), np.int64))
            outputs = _run(session, {"attention_mask": mask, **handed[call], **caches}, weights)
            handed[call] = {HIDDEN_INPUT: outputs.pop(HIDDEN_OUTPUT, None)}
            caches = {name: outputs[name.replace("past_key_values.", "present.")] for name in caches}
            results |= {
                f"call {call}: {name.removesuffix(_WIDE)}": value.numpy()
                for name, value in outputs.items()
                if name.endswith(_WIDE)
            }
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
    # Nodes run as they are written: nothing is fused otherwise at a cut than inside, and quantized weights are
    # dequantized one after the other, not all at once when the graph is loaded.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in {**SETTINGS, _FOLDER_SETTING: str(weights.parent)}.items():
        options.add_session_config_entry(key, value)
    content = ir.to_proto(rewritten).SerializeToString()
    return _reported(
        lambda: onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]), weights
    )


def _run(session: Any, feeds: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Feed and fetch ``OrtValue``s, which NumPy need not know the type of."""
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, _reported(lambda: session.run_with_ort_values(names, feeds), weights), strict=True))


def _reported(action: Callable[[], Any], weights: Path) -> Any:
    try:
        return action()
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        raise InputError(
            f"{weights}: ONNX Runtime cannot run a segment: {summary_of(error)}",
            "--skip-segment-check builds without this check",
        ) from error


def _probe(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with caches of a few slots, so that checking takes little more memory than the weights.

    Its outputs are there in float32, too: NumPy, and so ONNX Runtime's Python, cannot read bfloat16.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.ClearField("value_info")
    for value in (*probe.graph.input, *probe.graph.output):
        if is_cache(value.name):
            length = value.type.tensor_type.shape.dim[2]
            length.dim_value = min(_SLOTS, length.dim_value)
    for name in [value.name for value in probe.graph.output if value.name != HIDDEN_OUTPUT]:
        probe.graph.node.append(onnx.helper.make_node("Cast", [name], [name + _WIDE], to=onnx.TensorProto.FLOAT))
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name + _WIDE, onnx.TensorProto.FLOAT, None))
    return probe


def _empty(cache: onnx.ValueInfoProto) -> np.ndarray:
    """A cache for a batch of one."""
    _, heads, slots, width = (dim.dim_value for dim in cache.type.tensor_type.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(cache.type.tensor_type.elem_type)
    return np.zeros((1, heads, slots, width), dtype)
