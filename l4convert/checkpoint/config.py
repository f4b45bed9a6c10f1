"""The decoder's hyperparameters, normalised: what every checkpoint format is read into and the frontend builds from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (transformers ``modeling_rope_utils._compute_llama3_parameters``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer.

    Attributes:
        rope: Rotary positions (and QK norm, where the model has it); False: NoPE, with temperature tuning.
        chunked: Attention stays inside blocks of ``attention_chunk_size``; False: plain causal.
        moe: Routed experts plus a shared one; False: one dense SwiGLU of width ``intermediate_size_mlp``.
    """

    rope: bool
    chunked: bool
    moe: bool


@dataclass(frozen=True)
class DecoderConfig:
    """Llama 4's text decoder.

    Names are those of transformers' ``Llama4TextConfig``; widths are in elements, positions in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    intermediate_size_mlp: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_chunk_size: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: float
    attn_scale: float
    attention_bias: bool
    tie_word_embeddings: bool
    layers: tuple[LayerConfig, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)
