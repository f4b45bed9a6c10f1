"""The same steps through transformers, with its own cache; runs in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4convert.bench.caches import require_room
from l4convert.bench.results import Curve, Dtype
from l4convert.bench.sweep import Sweep, sweep
from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.parity.reference import load_transformers
from l4convert.progress import Task
from l4convert.runtime.runner import IntArray

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PeerOrder:
    """What to run: a checkpoint, in which type, with how many threads, and how far."""

    checkpoint: Path
    dtype: Dtype
    threads: int | None
    plan: Sweep


@dataclass(frozen=True)
class TransformersSubject:
    """A sequence in a ``DynamicCache``."""

    model: Any
    cache: Any
    config: DecoderConfig

    def feed(self, ids: IntArray) -> None:
        """Append tokens [1, S]; logits of the last one are computed."""
        import torch

        with torch.no_grad():
            self.model(
                input_ids=torch.from_numpy(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            ).logits.float().numpy()

    def cache_bytes(self) -> Mapping[str, int]:
        """Of the tensors that the cache holds."""
        total = {"global": 0, "chunked": 0}
        for layer, held in zip(self.config.layers, self.cache.layers, strict=True):
            total["chunked" if layer.chunked else "global"] += held.keys.nbytes + held.values.nbytes
        return total


@dataclass(frozen=True)
class TransformersSource:
    """Sequences of a loaded model."""

    model: Any
    config: DecoderConfig

    def fresh(self) -> TransformersSubject:
        """With an empty cache, which knows from the model's config which layers look back how far."""
        from transformers import DynamicCache

        return TransformersSubject(self.model, DynamicCache(config=self.model.config), self.config)

    def filled(self, length: int) -> TransformersSubject:
        """With random numbers in the cache: in layers with a limit, those that they would have kept."""
        import torch

        subject = self.fresh()
        for layer in subject.cache.layers:
            held = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            shape = (1, self.config.num_key_value_heads, held, self.config.head_dim)
            numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.model.dtype)
            layer.update(numbers, numbers.clone())
            if layer.is_sliding:
                layer.cumulative_length = length
        return subject


def measure_transformers(order: PeerOrder, task: Task) -> Curve:
    """Time transformers at every length.

    Raises:
        UsageError: Weights and caches do not fit into memory.
        BackendMissing, InputError: See :func:`l4convert.parity.reference.load_transformers`.
    """
    checkpoint = open_checkpoint(order.checkpoint)
    config = checkpoint.config
    size = _BYTES[order.dtype]
    weights = size * sum(tensor.size for tensor in checkpoint.tensors.values())
    require_room("transformers", weights + cache_bytes(config, order.plan.contexts[-1], size))
    model = load_transformers(checkpoint, order.dtype, attention=None)
    import torch
    import transformers

    if order.threads is not None:
        torch.set_num_threads(order.threads)
    points = sweep(TransformersSource(model, config), order.plan, None, task)
    attention = model.config._attn_implementation  # noqa: SLF001  # nothing else tells what was taken
    name = f"transformers {transformers.__version__}, {attention} attention"
    return Curve(name, order.dtype, "DynamicCache", tuple(points))


def cache_bytes(config: DecoderConfig, length: int, element: int) -> int:
    """Of a ``DynamicCache``, and of the layer that a step copies to make it longer."""
    slot = 2 * element * config.num_key_value_heads * config.head_dim
    slots = [min(length, config.attention_chunk_size) if layer.chunked else length for layer in config.layers]
    return slot * (sum(slots) + int(np.max(slots)))
