"""Find the scales of quantized caches: run a graph whose caches are not quantized, and look at what it caches.

The text is cut into windows, each of which starts at position 0. A window is as long as two chunks (at least
``LEAST_WINDOW`` tokens), so that keys from everywhere in a chunk and the tokens that follow a boundary are seen, or as
long as its caches fit into ``CACHE_BYTES``, if that is shorter. Keys and values of layers without positions depend on
what a token says, hardly on where it stands, so millions of positions need no longer windows; for rotated keys see
:mod:`l4convert.quantization.kv_scales`.

Memory: the caches of one window, the activations of one call, and the sample of :mod:`kv_scales`. The weights stay in
the mapped file, because ONNX Runtime neither packs them anew nor folds them; no head is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import InputError
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType
from l4convert.frontend.rope import inverse_frequencies
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.quantization.kv import KvScheme, scale_name
from l4convert.quantization.kv_scales import Float32, Rotation, Spread, sampled_tokens
from l4convert.runtime.caches import CacheNames
from l4convert.runtime.calibration_text import CalibrationText
from l4convert.runtime.loading import Loading, load_model
from l4convert.runtime.ort_values import host_array, ort_value
from l4convert.runtime.prefill import prefill_steps
from l4convert.runtime.runner import IntArray

LEAST_WINDOW = 1024
CACHE_BYTES = 1 << 30
# Attention scores of one call, float32 [heads, rows, context], and its rows at most: the more rows, the fewer times a
# weight is dequantized.
_SCORE_BYTES = 1 << 28
_MOST_ROWS = 1024


@dataclass(frozen=True)
class CalibrationGraph:
    """A graph to calibrate with, and how to run it.

    Attributes:
        file: The model; its weights lie beside it.
        config: Of the model.
        form: Of its caches: "growing", or "static" for graphs that write them in place.
        compute: The type that it computes in.
        cpu_form: See :class:`~l4convert.runtime.loading.Loading`.
    """

    file: Path
    config: DecoderConfig
    form: str
    compute: ComputeType
    cpu_form: bool

    @property
    def token_bytes(self) -> int:
        """Bytes of caches a token, while a call has past and present."""
        config, copies = self.config, 2 if self.form == "growing" else 1
        elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return copies * elements * int(COMPUTE_TYPES[self.compute].itemsize)

    @property
    def window(self) -> int:
        """Tokens in a window."""
        wanted = max(2 * self.config.attention_chunk_size, LEAST_WINDOW)
        return max(1, min(wanted, CACHE_BYTES // self.token_bytes, self.config.max_position_embeddings))

    def rows(self, context: int) -> int:
        """The most tokens in a call that ends at so many."""
        return min(_MOST_ROWS, max(1, _SCORE_BYTES // (4 * self.config.num_attention_heads * context)))


def calibrate(
    graph: CalibrationGraph, scheme: KvScheme, text: CalibrationText, progress: Progress = NO_PROGRESS
) -> dict[str, Float32]:
    """Scales of all layers that the scheme covers.

    Returns:
        Name of the initializer (:func:`scale_name`) -> float32 [1, Hk, 1, D].

    Raises:
        InputError: ONNX Runtime cannot run the graph, or a key or value is NaN or infinite.
        BackendMissing: onnxruntime is not installed.
    """
    spreads = _measure(graph, scheme, text, progress)
    scales = {}
    for (layer, kind), spread in spreads.items():
        if not np.isfinite(spread.maxima).all():
            raise InputError(
                f"{text.name}: a {kind} of layer {layer} is NaN or infinite, so its cache cannot be quantized",
                "the checkpoint is damaged, or the model overflows in this compute type: try --kv-dtype none",
            )
        scales[scale_name(layer, kind)] = spread.scales(scheme)
    return scales


def _measure(
    graph: CalibrationGraph, scheme: KvScheme, text: CalibrationText, progress: Progress
) -> dict[tuple[int, str], Spread]:
    config = graph.config
    spreads = {
        (layer, kind): Spread.empty(config.num_key_value_heads, config.head_dim)
        for layer in range(config.num_hidden_layers)
        if scheme.covers(config.layers[layer].chunked)
        for kind in ("key", "value")
    }
    rotation = Rotation(inverse_frequencies(config), config.attention_chunk_size)
    lengths = [len(ids) for ids in text.windows(graph.window)]
    chosen, done = sampled_tokens(sum(lengths)), 0
    session = load_model(graph.file, Loading(optimized=False, mapped=True, cpu_form=graph.cpu_form))
    with progress.task("Calibrating", total=sum(lengths), unit="tokens") as task:
        for ids in text.windows(graph.window):
            for part in _caches(graph, session, ids):
                places = np.arange(part.start, part.end) % config.attention_chunk_size
                picked = chosen[(chosen >= done + part.start) & (chosen < done + part.end)] - done - part.start
                for (layer, kind), spread in spreads.items():
                    rows = part.rows(layer, kind)
                    if kind == "key" and config.layers[layer].rope:
                        spread.add_rotated(rows, picked, places, rotation)
                    else:
                        spread.add(rows, picked)
                task.advance(part.end - part.start)
            done += len(ids)
    return spreads


@dataclass(frozen=True)
class _Part:
    """Tokens ``start`` to ``end`` of a window, which lie in one chunk, and the caches in which they are."""

    start: int
    end: int
    values: Mapping[str, Any]
    first: Mapping[str, int]

    def rows(self, layer: int, kind: str) -> Float32:
        """Keys or values of the tokens, [Hk, n, D]."""
        name = f"present.{layer}.{kind}"
        first = self.first[name]
        return np.asarray(host_array(self.values[name])[0, :, first : first + self.end - self.start], np.float32)


def _caches(graph: CalibrationGraph, session: Any, ids: IntArray) -> Iterator[_Part]:
    """Run a window, call by call."""
    names, chunk = CacheNames.of(graph.config), graph.config.attention_chunk_size
    static = graph.form == "static"
    slots = [0 if not static else min(s or len(ids), len(ids)) for s in names.slots]
    past = [_empty(graph, count) for count in slots]
    end = 0
    for step in prefill_steps(0, len(ids), chunk, graph.rows):
        start, end = end, end + step
        feeds = {"input_ids": ids[None, start:end], "attention_mask": np.ones((1, end), np.int64)}
        past = _run(graph, session, names, past, feeds, static)
        first = {
            name: start % chunk if static and own is not None else start
            for name, own in zip(names.present, names.slots, strict=True)
        }
        yield _Part(start, end, dict(zip(names.present, past, strict=True)), first)


def _empty(graph: CalibrationGraph, slots: int) -> Any:
    config = graph.config
    shape = (1, config.num_key_value_heads, slots, config.head_dim)
    return ort_value(np.zeros(shape, COMPUTE_TYPES[graph.compute].numpy()))


def _run(
    graph: CalibrationGraph,
    session: Any,
    names: CacheNames,
    past: list[Any],
    feeds: Mapping[str, npt.NDArray[np.int64]],
    static: bool,
) -> list[Any]:
    """One call; the caches after it, which are the same buffers in the static form."""
    binding = session.io_binding()
    taken = {value.name for value in session.get_inputs()}
    for name, array in feeds.items():
        if name in taken:
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
    for name, result, value in zip(names.past, names.present, past, strict=True):
        if name in taken:
            binding.bind_ortvalue_input(name, value)
        if static:
            binding.bind_ortvalue_output(result, value)
        else:
            binding.bind_output(result, "cpu")
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime's exception types are private
        raise InputError(f"{graph.file.name}: ONNX Runtime failed while calibrating: {_line(error)}") from error
    return past if static else list(binding.get_outputs())


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def without_logits(model: ir.Model) -> None:
    """Leave only what the caches need: no head, and nothing after the last layer's keys and values."""
    from onnx_ir.passes import common

    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name != "logits"]
    common.RemoveUnusedNodesPass()(model)
