"""Published models without their weights: configs, and tensors that have a shape but no content."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.base import Checkpoint, Experts
from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import expected_tensors
from l4convert.errors import UsageError


def _layers(count: int, moe_step: int) -> tuple[LayerConfig, ...]:
    """Every 4th layer is global without RoPE, every ``moe_step``-th has experts."""
    return tuple(LayerConfig(i % 4 != 3, i % 4 != 3, i % moe_step == moe_step - 1) for i in range(count))


#: Llama 4 Scout 17B-16E, the text decoder (Hugging Face ``config.json`` of the published checkpoint).
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
    layers=_layers(48, moe_step=1),
    bos_token_id=200000,
    eos_token_ids=(200001, 200007, 200008),
    pad_token_id=200018,
)

#: Llama 4 Maverick 17B-128E, the text decoder (likewise).
MAVERICK = dataclasses.replace(
    SCOUT,
    num_local_experts=128,
    max_position_embeddings=1_048_576,
    rope_scaling=None,
    use_qk_norm=False,
    layers=_layers(48, moe_step=2),
)

#: A model of the size announced for Llama 4 Behemoth. Known (Meta, "The Llama 4 herd", April 2025): 16 experts, 288 B
#: active of nearly 2 T parameters. Assumed, because nothing else was published: 96 layers that are all MoE, hidden size
#: 16384, expert width 24576, 128 heads of 128 with 8 KV heads, and Maverick's vocabulary, positions and attention.
#: That gives 2.03 T parameters, 293 B of them active.
BEHEMOTH = dataclasses.replace(
    MAVERICK,
    hidden_size=16384,
    intermediate_size=24576,
    intermediate_size_mlp=49152,
    num_attention_heads=128,
    num_local_experts=16,
    layers=_layers(96, moe_step=1),
)

PRESETS: Mapping[str, DecoderConfig] = {"scout": SCOUT, "maverick": MAVERICK, "behemoth": BEHEMOTH}


class Contentless(LazyTensor):
    """A tensor to plan with: asking for its content is a defect."""

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name or "",)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        raise RuntimeError(f"{self.name} was read, but a preset has no weights")


def planned_tensors(config: DecoderConfig, experts: Experts) -> dict[str, LazyTensor]:
    """All tensors of a checkpoint of this config, in BF16 as Llama 4 is published, without content."""
    shapes = expected_tensors(config, experts)
    return {name: Contentless(ir.DataType.BFLOAT16, shape, name=name) for name, shape in shapes.items()}


def preset_checkpoint(name: str) -> Checkpoint:
    """A checkpoint of a published model that can be planned with, but not converted: no weights, no other files.

    Raises:
        UsageError: There is no preset of this name.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}", f"presets: {', '.join(PRESETS)}")
    config = PRESETS[name]
    return Checkpoint(Path(f"preset {name}"), "preset", config, planned_tensors(config, "stacked"), "stacked", (), ())
