"""``convert --verify-passes``: run the graph before and after a pass and compare what it computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig, LayerConfig
from l4convert.emit.memory import available_bytes
from l4convert.errors import CheckFailed, InputError
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType
from l4convert.graph_passes.base import Pass, PassReport
from l4convert.progress import Progress
from l4convert.quantization.recipe import Recipe
from l4convert.runtime.cuda_kernels import has_cuda_kernels
from l4convert.runtime.ort_values import as_float32, ort_value
from l4convert.runtime.session import load_model

#: Largest |difference| of any output that an exact pass may make, relative to the largest |value| of that output.
#: By the type that the graph computes in: sums in another order round differently, and 16 bits are soon rounded.
EXACT_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
#: The same where a recipe rounds activations to FP8: the least difference may become one of a whole step, an eighth of
#: the number, and all that follows is computed from it. What is plainly wrong is still seen.
ROUNDED_TOLERANCES = {"float32": 0.1, "float16": 0.5, "bfloat16": 0.5}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Probes:
    """What a graph is given to compute.

    Attributes:
        config: The decoder.
        kv_cache: The form of its cache.
        compute: The type of its caches.
        in_place: Whether a call must stay in one chunk, with padding last (l4convert/runtime/calls.py).
    """

    config: DecoderConfig
    kv_cache: str
    compute: str = "float32"
    in_place: bool = False


def verified(graph_pass: Pass, model: ir.Model, recipe: Recipe, probes: Probes, progress: Progress) -> PassReport:
    """Run a pass; fail if it changed what the graph computes.

    The graph is run in ONNX Runtime on a cache of noise that ends shortly before a chunk boundary: once inside the
    chunk, once across its end, and once as a batch with padding. After a pass that is not exact (quantization) the
    outputs only have to be finite: their distance is what ``validate`` measures.

    Raises:
        CheckFailed: An output differs, is gone or is not finite, or the graph does not run any more.
        InputError: The weights do not fit in memory, in which the graph has to run.
    """
    _check_memory(model)
    with progress.task(f"Verifying {graph_pass.name}", total=2, unit="runs") as task:
        before = _run(model, probes)
        task.advance(1)
        report = graph_pass(model, recipe)
        after = _run_after(graph_pass, model, probes)
        task.advance(1)
    rounded = any(rule.scheme.activations for rule in recipe.rules)
    tolerance = (ROUNDED_TOLERANCES if rounded else EXACT_TOLERANCES)[probes.compute]
    for name, expected in before.items():
        if name not in after:
            raise CheckFailed(f"pass {graph_pass.name}: {name} is no output any more")
        _compare(graph_pass, name, expected, after[name], tolerance)
    return report


def _run_after(graph_pass: Pass, model: ir.Model, probes: Probes) -> Arrays:
    """What ran before the pass and does not run now is the pass's doing."""
    try:
        return _run(model, probes)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        summary = " ".join(str(error).split())
        raise CheckFailed(f"pass {graph_pass.name}: the graph does not run any more: {summary}") from error


def _compare(graph_pass: Pass, name: str, expected: np.ndarray, actual: np.ndarray, tolerance: float) -> None:
    if expected.shape != actual.shape:
        raise CheckFailed(f"pass {graph_pass.name}: {name} has shape {actual.shape}, {expected.shape} before")
    if not np.isfinite(actual).all():
        raise CheckFailed(f"pass {graph_pass.name}: {name} is not finite")
    difference = float(np.abs(actual - expected).max(initial=0.0))
    limit = tolerance * float(np.abs(expected).max(initial=0.0))
    if graph_pass.exact and not difference <= limit:
        raise CheckFailed(f"pass {graph_pass.name}: {name} differs by {difference:.3g}, more than {limit:.3g}")


def _run(model: ir.Model, probes: Probes) -> Arrays:
    """All outputs of all probes, named ``probe: output``; key/value slots of padding and unwritten slots left out."""
    with tempfile.TemporaryDirectory(prefix="l4convert-verify-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="weights.bin")
        # What is compared is the graph as written, not what the runtime's optimizer would make of it.
        rewrite = probes.compute == "bfloat16" or has_cuda_kernels(model)
        session = load_model(path, optimized=False, cpu_form=rewrite, fuse_quantized=False)
        names = [output.name for output in session.get_outputs()]
        results: Arrays = {}
        for probe, feeds in probe_feeds(probes):
            real = feeds["attention_mask"][:, -feeds["input_ids"].shape[1] :] > 0
            values = session.run_with_ort_values(names, {name: ort_value(array) for name, array in feeds.items()})
            outputs = {name: as_float32(value) for name, value in zip(names, values, strict=True)}
            results[f"{probe}: logits"] = outputs["logits"][real]
            if real.all():
                results |= {f"{probe}: {name}": value for name, value in outputs.items() if name != "logits"}
        return results


def probe_feeds(probes: Probes) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Named inputs of the decoder, always the same ones."""
    config, chunk = probes.config, probes.config.attention_chunk_size
    dtype = COMPUTE_TYPES[cast("ComputeType", probes.compute)].numpy()
    past = max(chunk - 3, 0)
    rng = np.random.default_rng(0)
    inside = min(2, chunk)
    cases = {"inside a chunk": (1, inside), "across a boundary": (1, 7), "padded batch": (2, 7)}
    if probes.in_place:
        cases = {"inside a chunk": (1, inside), "padded batch": (2, inside)}
    for name, (batch, new) in cases.items():
        mask = np.ones((batch, past + new), np.int64)
        if batch > 1:
            mask[1, :2] = mask[1, -1 if probes.in_place else past + 1] = 0
        feeds: Arrays = {"input_ids": rng.integers(0, config.vocab_size, (batch, new)), "attention_mask": mask}
        for number, layer in enumerate(config.layers):
            slots = _slots(layer, chunk, past, new, probes.kv_cache)
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            for part in ("key", "value"):
                feeds[f"past_key_values.{number}.{part}"] = rng.standard_normal(shape).astype(dtype)
        yield name, feeds


def _slots(layer: LayerConfig, chunk: int, past: int, new: int, kv_cache: str) -> int:
    if kv_cache != "static":
        return past
    return min(chunk, past + new) if layer.chunked else past + new


def _check_memory(model: ir.Model) -> None:
    """The graph runs in float32, once as a file and once in a session."""
    elements = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    needed = 2 * 4 * elements
    available = available_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"--verify-passes runs the graph, which takes about {needed / 1e9:.1f} GB of memory;"
            f" {available / 1e9:.1f} GB are free",
            "verify on a checkpoint of the same layout with fewer or smaller layers",
        )
