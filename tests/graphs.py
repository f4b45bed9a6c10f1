"""Run graphs in ONNX Runtime the way a client would, and the reference that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES, PASSES, Pass, PassReport
from l4convert.quantization.carry_over import resolve
from l4convert.quantization.recipe import Recipe, load_recipe
from l4convert.targets import TARGETS

KEEP = load_recipe("none")
CAPACITY = 64  # slots of a static cache's global layers


def canonical(checkpoint: Checkpoint, kv_cache: str = "growing", compute: str = "float32") -> ir.Model:
    return build_decoder(checkpoint.config, checkpoint.tensors, checkpoint.experts, kv_cache, compute)  # type: ignore[arg-type]


def lowered(
    checkpoint: Checkpoint, target: str, kv_cache: str = "growing", recipe: Recipe = KEEP, compute: str = "float32"
) -> ir.Model:
    model = canonical(checkpoint, kv_cache, compute)
    recipe = resolve(recipe, checkpoint)
    for graph_pass in (*CANONICAL_PASSES, *TARGETS[target].lowering):
        graph_pass(model, recipe)
    return model


def op_counts(model: ir.Model) -> dict[str, int]:
    """Operators of the whole model, ``If`` branches included."""
    counts: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def run_passes(model: ir.Model, *names: str, recipe: Recipe = KEEP) -> tuple[PassReport, ...]:
    """Run passes by name."""
    by_name: dict[str, Pass] = {row.name: row for row in PASSES}
    return tuple(by_name[name](model, recipe) for name in names)


def snapshot(model: ir.Model) -> bytes:
    """Everything a model is, weights included."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


class Client:
    """A session and the caches of one batch of streams.

    Args:
        optimize: Let ONNX Runtime rewrite the graph. It cannot load FP8 activations then, see split_activation_scales.
    """

    def __init__(self, model: ir.Model, config: DecoderConfig, kv_cache: str, optimize: bool = True) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        # ONNX Runtime rewrites MatMul with dequantized INT4 weights; 1: without rounding the activations to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = ir.to_proto(model).SerializeToString()
        self.session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]
        self.config, self.kv_cache = config, kv_cache

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        config = self.config
        caches = {}
        for number, layer in enumerate(config.layers):
            slots = min(config.attention_chunk_size, CAPACITY) if layer.chunked else CAPACITY
            shape = (batch, config.num_key_value_heads, slots if self.kv_cache == "static" else 0, config.head_dim)
            caches |= {f"past_key_values.{number}.{part}": np.zeros(shape, np.float32) for part in ("key", "value")}
        return caches

    def logits(self, ids: np.ndarray, splits: Sequence[int], mask: np.ndarray | None = None) -> np.ndarray:
        """Feed ``ids`` [B,T] in calls of these lengths; returns [B,T,vocab]."""
        mask = np.ones_like(ids) if mask is None else mask
        caches, pieces, done = self.empty(len(ids)), [], 0
        for length in splits:
            feeds = {"input_ids": ids[:, done : done + length], "attention_mask": mask[:, : done + length], **caches}
            outputs = dict(zip(self.names, self.session.run(None, feeds), strict=True))
            caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
            pieces.append(outputs["logits"])
            done += length
        self.caches = caches
        return np.concatenate(pieces, axis=1)


TOKENS = 29
SPLITS = ((TOKENS,), (5, 7, 1, 13, 3))  # chunks of 8: boundaries inside calls and between them


def token_ids(batch: int) -> np.ndarray:
    """Random tokens [batch, TOKENS], none of them special."""
    return np.random.default_rng(7).integers(3, 128, (batch, TOKENS))


def outputs(model: ir.Model, config: DecoderConfig, kv_cache: str = "growing", optimize: bool = True) -> np.ndarray:
    """Logits [N,vocab] of a batch of two in different splits, and of a padded one; rows of padding left out."""
    client = Client(model, config, kv_cache, optimize)
    ids = token_ids(2)
    pieces = [client.logits(ids, splits).reshape(-1, config.vocab_size) for splits in SPLITS]
    mask = np.ones_like(ids)
    mask[0, :5] = mask[1, -9:] = 0
    pieces.append(client.logits(ids, (17, 12), mask)[mask > 0])
    return np.concatenate(pieces)


def reference_logits(
    path: Path, ids: np.ndarray, weights: Callable[[str, np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """transformers, eager, float32, one call without a cache: [B,T,vocab].

    Args:
        path: The checkpoint.
        ids: Tokens [B,T].
        weights: Given a canonical name and its tensor in float32, the tensor to compute with instead.
    """
    import torch
    from transformers import Llama4ForCausalLM

    model: Any = Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters() if weights else ():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights(name, parameter.numpy()))))
        logits: np.ndarray = model.eval()(torch.tensor(ids), use_cache=False).logits.numpy()
    return logits


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
