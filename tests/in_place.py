"""Run graphs with static caches in ONNX Runtime, in any compute type, through calls that can be done in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.compute import COMPUTE_TYPES
from l4convert.runtime.calls import in_place_calls
from l4convert.runtime.cpu_form import to_cpu_form
from l4convert.runtime.ort_values import as_float32, ort_value
from tests.graphs import CAPACITY


def session_of(model: ir.Model) -> Any:
    """A session of a copy that the CPU provider can run; the graph is run as it is written."""
    import onnxruntime as ort

    copy = ir.from_proto(ir.to_proto(model))
    to_cpu_form(copy)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(copy).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def run(session: Any, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """All outputs by name, as ONNX Runtime's values."""
    names = [output.name for output in session.get_outputs()]
    values = session.run_with_ort_values(names, {name: ort_value(array) for name, array in feeds.items()})
    return dict(zip(names, values, strict=True))


class InPlaceClient:
    """A session and the caches of one batch; the caches are noise before the first token."""

    def __init__(self, model: ir.Model, config: DecoderConfig, compute: str = "float32") -> None:
        self.session, self.config = session_of(model), config
        self.dtype = COMPUTE_TYPES[compute].numpy()  # type: ignore[index]

    def fresh(self, batch: int) -> dict[str, Any]:
        """What a slot holds before it is written must not matter."""
        config, rng = self.config, np.random.default_rng(5)
        caches = {}
        for number, layer in enumerate(config.layers):
            slots = config.attention_chunk_size if layer.chunked else CAPACITY
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            for part in ("key", "value"):
                noise = 9 * rng.standard_normal(shape).astype(np.float32)
                caches[f"past_key_values.{number}.{part}"] = ort_value(noise.astype(self.dtype))
        return caches

    def logits(self, ids: np.ndarray, splits: Sequence[int], mask: np.ndarray | None = None) -> np.ndarray:
        """Feed ``ids`` [B,T] in calls of these lengths, each cut as it must be; returns float32 [B,T,vocab]."""
        mask = np.ones_like(ids) if mask is None else mask
        result = np.zeros((*ids.shape, self.config.vocab_size), np.float32)
        names = [output.name for output in self.session.get_outputs()]
        caches, lengths, begin = self.fresh(len(ids)), np.zeros(len(ids), np.int64), 0
        for width in splits:
            part = slice(begin, begin + width)
            for call in in_place_calls(lengths, mask[:, part], self.config.attention_chunk_size):
                feeds = {"input_ids": call.take(ids[:, part]), "attention_mask": call.attention_mask()}
                values = {name: ort_value(np.ascontiguousarray(array)) for name, array in feeds.items()}
                outputs = dict(zip(names, self.session.run_with_ort_values(names, values | caches), strict=True))
                caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
                call.put(as_float32(outputs["logits"]), result[:, part])
            lengths, begin = lengths + mask[:, part].sum(axis=1), begin + width
        return result
