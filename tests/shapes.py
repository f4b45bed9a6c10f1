"""Weights that have a shape but no content: reading one is an error."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import expected_tensors

SCOUT = DecoderConfig(
    vocab_size=202048,
    hidden_size=5120,
    intermediate_size=8192,
    intermediate_size_mlp=16384,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    num_local_experts=16,
    num_experts_per_tok=1,
    rms_norm_eps=1e-5,
    max_position_embeddings=10_485_760,
    attention_chunk_size=8192,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192),
    use_qk_norm=True,
    attn_temperature_tuning=True,
    floor_scale=8192,
    attn_scale=0.1,
    attention_bias=False,
    tie_word_embeddings=False,
    layers=tuple(LayerConfig(rope=i % 4 != 3, chunked=i % 4 != 3, moe=True) for i in range(48)),
    bos_token_id=200000,
    eos_token_ids=(200001, 200007, 200008),
    pad_token_id=200018,
)
MAVERICK = dataclasses.replace(
    SCOUT,
    num_local_experts=128,
    max_position_embeddings=1_048_576,
    rope_scaling=None,
    use_qk_norm=False,
    layers=tuple(LayerConfig(rope=i % 4 != 3, chunked=i % 4 != 3, moe=i % 2 == 1) for i in range(48)),
)


class Unreadable(LazyTensor):
    """A planned tensor; any attempt to compute it fails the test."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name or "",)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        raise AssertionError(f"{self.name} was read")


def planned_tensors(config: DecoderConfig, experts: str) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint of this config."""
    shapes = expected_tensors(config, experts)  # type: ignore[arg-type]
    return {name: Unreadable(ir.DataType.BFLOAT16, shape, name=name) for name, shape in shapes.items()}
