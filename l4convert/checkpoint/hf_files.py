"""The small files of a Hugging Face checkpoint, made for a checkpoint that has none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig, RopeScaling
from l4convert.checkpoint.hf_config import CHUNKED, FULL, TEXT

_DTYPES = {ir.DataType.BFLOAT16: "bfloat16", ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}


def config_json(config: DecoderConfig, dtype: ir.DataType) -> bytes:
    """``config.json`` of ``Llama4ForCausalLM``, in the keys that transformers 4.51 and later understand.

    Args:
        config: The decoder.
        dtype: What its weights are stored in.
    """
    layers, floor = config.layers, float(config.floor_scale)
    chunked = any(layer.chunked for layer in layers)
    return _encoded(
        {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": TEXT,
            "torch_dtype": _DTYPES.get(dtype, "bfloat16"),
            "hidden_act": "silu",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "intermediate_size_mlp": config.intermediate_size_mlp,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "num_local_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_layers": [i for i, layer in enumerate(layers) if layer.moe],
            "no_rope_layers": [int(layer.rope) for layer in layers],
            "layer_types": [CHUNKED if layer.chunked else FULL for layer in layers],
            "attention_chunk_size": config.attention_chunk_size if chunked else None,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_theta,
            "rope_scaling": None if config.rope_scaling is None else _scaling(config.rope_scaling),
            "rms_norm_eps": config.rms_norm_eps,
            "use_qk_norm": config.use_qk_norm,
            "attn_temperature_tuning": config.attn_temperature_tuning,
            "floor_scale": int(floor) if floor.is_integer() else floor,  # transformers 5 takes an integer only
            "attn_scale": config.attn_scale,
            "attention_bias": config.attention_bias,
            "tie_word_embeddings": config.tie_word_embeddings,
            **_token_ids(config),
        }
    )


def generation_config_json(config: DecoderConfig, sampling: Mapping[str, float]) -> bytes:
    """``generation_config.json``: where texts end, and how tokens are drawn unless a caller says otherwise."""
    return _encoded({**_token_ids(config), "do_sample": True, **sampling})


def tokenizer_config_json(names: Mapping[str, str], positions: int) -> bytes:
    """``tokenizer_config.json`` beside a ``tokenizer.json``.

    Args:
        names: ``bos_token`` and the like to the token's text.
        positions: The longest text in tokens.
    """
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    inputs = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": positions}
    return _encoded({**fixed, **names, **inputs})


def _scaling(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _token_ids(config: DecoderConfig) -> dict[str, Any]:
    ends = list(config.eos_token_ids)
    return {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}


def _encoded(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
