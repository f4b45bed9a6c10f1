"""Graphs with quantized caches: made, given scales, and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint import Checkpoint
from l4convert.graph_passes.quantize_kv_cache import kv_scale_names, set_kv_scales
from l4convert.quantization.kv import KV_FORMATS, KvDtype, kv_scheme
from l4convert.quantization.recipe import Recipe
from l4convert.runtime.ort_values import as_float32, ort_value
from l4convert.targets import TARGETS
from tests.graphs import CAPACITY, KEEP, canonical, run_passes

OUTLINED = ("outline_attention", "quantize_kv_cache")


def recipe(dtype: KvDtype, layers: str = "all") -> Recipe:
    return dataclasses.replace(KEEP, kv_cache=kv_scheme(dtype, layers=layers))


def scales(model: ir.Model, dtype: KvDtype, reach: float = 3.0) -> dict[str, np.ndarray]:
    """One a channel, all different; the largest code stands for ``reach``, give or take a third."""
    rng = np.random.default_rng(11)
    highest = KV_FORMATS[dtype].highest

    def scale(name: str) -> np.ndarray:
        shape = tuple(model.graph.initializers[name].shape or ())
        result: np.ndarray = (rng.uniform(0.7, 1.3, shape) * reach / highest).astype(np.float32)
        return result

    return {name: scale(name) for name in kv_scale_names(model)}


def quantized(
    checkpoint: Checkpoint, dtype: KvDtype, kv_cache: str, target: str = "portable", *, layers: str = "all",
    compute: str = "float32", reach: float = 3.0,
) -> ir.Model:  # fmt: skip
    """A decoder with quantized caches, lowered for a target."""
    model, rules = canonical(checkpoint, kv_cache, compute), recipe(dtype, layers)
    run_passes(model, *OUTLINED, recipe=rules)
    set_kv_scales(model, scales(model, dtype, reach))
    for graph_pass in TARGETS[target].lowering:
        graph_pass(model, rules)
    return model


class CacheClient:
    """A session of a graph as it is, and the caches of one batch of streams, of whatever type."""

    def __init__(self, model: ir.Model, checkpoint: Checkpoint, kv_cache: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        proto = ir.to_proto(model).SerializeToString()
        self.session: Any = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.config, self.kv_cache = checkpoint.config, kv_cache
        self.dtypes = {str(v.name): v.dtype.numpy() for v in model.graph.inputs if v.dtype is not None}
        self.caches: dict[str, Any] = {}

    def empty(self, batch: int) -> dict[str, Any]:
        caches = {}
        for number, layer in enumerate(self.config.layers):
            slots = min(self.config.attention_chunk_size, CAPACITY) if layer.chunked else CAPACITY
            for part in ("key", "value"):
                name = f"past_key_values.{number}.{part}"
                dtype = self.dtypes[name]
                width = self.config.head_dim // (2 if dtype == np.uint8 else 1)
                shape = (batch, self.config.num_key_value_heads, slots if self.kv_cache == "static" else 0, width)
                caches[name] = ort_value(np.zeros(shape, dtype))
        return caches

    def logits(self, ids: np.ndarray, splits: Sequence[int], mask: np.ndarray | None = None) -> np.ndarray:
        """Feed ``ids`` [B,T] in calls of these lengths; float32 [B,T,vocab]."""
        mask = np.ones_like(ids) if mask is None else mask
        names = [output.name for output in self.session.get_outputs()]
        self.caches, pieces, done = self.empty(len(ids)), [], 0
        for length in splits:
            tokens = np.ascontiguousarray(ids[:, done : done + length])
            seen = np.ascontiguousarray(mask[:, : done + length])
            feeds = {"input_ids": ort_value(tokens), "attention_mask": ort_value(seen)}
            outputs = dict(zip(names, self.session.run_with_ort_values(names, feeds | self.caches), strict=True))
            self.caches = {name: outputs[name.replace("past_key_values", "present")] for name in self.caches}
            pieces.append(as_float32(outputs["logits"]))
            done += length
        return np.concatenate(pieces, axis=1)

    def codes(self) -> dict[str, np.ndarray]:
        """What the caches hold after the last call."""
        return {name: as_float32(value) for name, value in self.caches.items()}
