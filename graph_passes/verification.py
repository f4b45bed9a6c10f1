"""``convert --verify-passes``: run the graph before and after a pass and compare what it computes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig, LayerConfig
from l4convert.emit.memory import available_bytes
from l4convert.errors import CheckFailed, InputError, summary_of
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType
from l4convert.graph_passes.base import Pass, PassReport
from l4convert.graph_passes.quantize_kv_cache import kv_scale_names
from l4convert.progress import Progress
from l4convert.quantization.kv import KV_FORMATS, KvDtype
from l4convert.quantization.kv_codes import dequantize_kv, quantize_kv
from l4convert.quantization.recipe import Recipe
from l4convert.runtime.cuda_kernels import has_cuda_kernels
from l4convert.runtime.loading import Loading, load_model
from l4convert.runtime.ort_values import as_float32, ort_value

#: Largest |difference| of any output that an exact pass may make, relative to the largest |value| of that output.
#: By the type that the graph computes in: sums in another order round differently, and 16 bits are soon rounded.
EXACT_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
#: The same where a recipe rounds activations to FP8: the least difference may become one of a whole step, an eighth of
#: the number, and all that follows is computed from it. What is plainly wrong is still seen.
ROUNDED_TOLERANCES = {"float32": 0.1, "float16": 0.5, "bfloat16": 0.5}
#: The same where caches are quantized: the least difference may make another code of a number.
CACHE_TOLERANCES = {"int8": 0.02, "fp8": 0.1, "int4": 0.2}
#: What the largest code stands for while a graph with quantized caches is verified. Scales come from calibration, and
#: noise of this size, such as fills the caches here, has to be told apart by its codes.
CACHE_RANGE = 4.0
#: From the largest code to the next: what a number of a cache may differ by on top of its tolerance. E4M3 has steps of
#: 32 below 448.
CACHE_STEPS = {"int8": CACHE_RANGE / 127, "fp8": CACHE_RANGE * 32 / 448, "int4": CACHE_RANGE / 7}
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
    outputs only have to be finite: their distance is what ``validate`` measures. Quantized caches get scales for the
    noise, and are compared as the numbers that they stand for.

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
    tolerance, caches = _tolerance(model, recipe, probes), _quantized_caches(model)
    for name, expected in before.items():
        if name not in after:
            raise CheckFailed(f"pass {graph_pass.name}: {name} is no output any more")
        step = CACHE_STEPS.get(caches.get(name.rpartition(": ")[2], ""), 0.0)
        _compare(graph_pass, name, expected, after[name], tolerance * float(np.abs(expected).max(initial=0.0)) + step)
    return report


def _tolerance(model: ir.Model, recipe: Recipe, probes: Probes) -> float:
    rounded = any(rule.scheme.activations for rule in recipe.rules)
    tolerance = (ROUNDED_TOLERANCES if rounded else EXACT_TOLERANCES)[probes.compute]
    return max([tolerance, *(CACHE_TOLERANCES[dtype] for dtype in _quantized_caches(model).values())])


def _quantized_caches(model: ir.Model) -> dict[str, KvDtype]:
    """Format of each quantized cache, by the name of its input and of its output."""
    formats = {elements.storage: dtype for dtype, elements in KV_FORMATS.items()}
    values = (v for v in (*model.graph.inputs, *model.graph.outputs) if (v.name or "").startswith(("past_", "present")))
    return {str(v.name): formats[v.dtype] for v in values if v.dtype in formats}


def _run_after(graph_pass: Pass, model: ir.Model, probes: Probes) -> Arrays:
    """What ran before the pass and does not run now is the pass's doing."""
    try:
        return _run(model, probes)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        raise CheckFailed(f"pass {graph_pass.name}: the graph does not run any more: {summary_of(error)}") from error


def _compare(graph_pass: Pass, name: str, expected: np.ndarray, actual: np.ndarray, limit: float) -> None:
    if expected.shape != actual.shape:
        raise CheckFailed(f"pass {graph_pass.name}: {name} has shape {actual.shape}, {expected.shape} before")
    if not np.isfinite(actual).all():
        raise CheckFailed(f"pass {graph_pass.name}: {name} is not finite")
    difference = float(np.abs(actual - expected).max(initial=0.0))
    if graph_pass.exact and not difference <= limit:
        raise CheckFailed(f"pass {graph_pass.name}: {name} differs by {difference:.3g}, more than {limit:.3g}")


def _run(model: ir.Model, probes: Probes) -> Arrays:
    """All outputs of all probes, named ``probe: output``; key/value slots of padding and unwritten slots left out."""
    caches = _quantized_caches(model)
    with tempfile.TemporaryDirectory(prefix="l4convert-verify-") as folder:
        path = Path(folder) / "model.onnx"
        with _scales_for_noise(model, caches):
            ir.save(model, path, external_data="weights.bin")
        # What is compared is the graph as written, not what the runtime's optimizer would make of it.
        rewrite = probes.compute == "bfloat16" or has_cuda_kernels(model)
        session = load_model(path, Loading(optimized=False, cpu_form=rewrite, fuse_quantized=False))
        names = [output.name for output in session.get_outputs()]
        results: Arrays = {}
        for probe, feeds in probe_feeds(probes):
            real = feeds["attention_mask"][:, -feeds["input_ids"].shape[1] :] > 0
            stored = {name: ort_value(_as_stored(array, caches.get(name))) for name, array in feeds.items()}
            values = session.run_with_ort_values(names, stored)
            outputs = {n: _as_numbers(value, caches.get(n)) for n, value in zip(names, values, strict=True)}
            results[f"{probe}: logits"] = outputs["logits"][real]
            if real.all():
                results |= {f"{probe}: {name}": value for name, value in outputs.items() if name != "logits"}
        return results


@contextmanager
def _scales_for_noise(model: ir.Model, caches: Mapping[str, KvDtype]) -> Iterator[None]:
    """The model with scales that map ``CACHE_RANGE`` to the largest code; afterwards it has its own ones again."""
    values = [model.graph.initializers[name] for name in kv_scale_names(model)]
    own = [value.const_value for value in values]
    layers = {name.split(".")[1]: dtype for name, dtype in caches.items()}
    for value in values:
        scale = _noise_scale(layers[str(value.name).split(".")[2]])
        assert value.const_value is not None  # an initializer
        value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), scale), name=value.name)
    try:
        yield
    finally:
        for value, tensor in zip(values, own, strict=True):
            value.const_value = tensor


def _noise_scale(dtype: KvDtype) -> np.ndarray:
    return np.full(1, CACHE_RANGE / KV_FORMATS[dtype].highest, np.float32)


def _as_stored(array: np.ndarray, dtype: KvDtype | None) -> np.ndarray:
    return array if dtype is None else quantize_kv(array, _noise_scale(dtype), dtype)


def _as_numbers(value: Any, dtype: KvDtype | None) -> np.ndarray:
    codes = as_float32(value)
    if dtype is None:
        return codes
    return dequantize_kv(codes.astype(KV_FORMATS[dtype].storage.numpy()), _noise_scale(dtype), dtype)


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
