"""Small random Llama 4 checkpoints on disk, named and shaped by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL: Mapping[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 4096,
    "attention_chunk_size": 8,
    "floor_scale": 8,
    "attn_scale": 0.3,
    "use_qk_norm": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Scout's form of scaling (both frequency factors 1); all but the fastest frequency are slowed.
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 16,
    },
}

MAVERICK: Mapping[str, Any] = {
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}


def write_random_checkpoint(
    path: Path,
    *,
    unfused: bool = False,
    shards: int = 1,
    dtype: str = "bfloat16",
    conditional: bool = False,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint in Hugging Face's layout.

    The same seed and config give the same weights whatever ``unfused``, ``shards`` and ``conditional`` say, so that a
    checkpoint transformers cannot read (unfused) has a twin that it can.

    Args:
        path: Folder to make.
        unfused: ``experts.{e}.{gate,up,down}_proj.weight`` [out, in] for the stacked projections.
        shards: Number of files; more than one: with an index.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        conditional: As ``Llama4ForConditionalGeneration`` saves it, vision tensors included.
        seed: Of the weights.
        **config_overrides: Keys of ``Llama4TextConfig`` over :data:`SMALL`.

    Returns:
        ``path``.
    """
    import torch

    text, model_config, shapes = _describe(config_overrides, conditional)
    generator = torch.Generator().manual_seed(seed)
    # Text before vision, so that both kinds of checkpoint draw the same text weights.
    names = sorted(shapes, key=lambda name: (name.startswith(("vision_model.", "multi_modal")), name))
    tensors = {
        name: _random(name, shapes[name], text["initializer_range"], generator).to(getattr(torch, dtype))
        for name in names
    }
    if text.get("tie_word_embeddings"):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("lm_head.weight")}
    if unfused:
        tensors = unfuse(tensors)
    path.mkdir(parents=True, exist_ok=True)
    save_sharded(path, tensors, shards)
    (path / "config.json").write_text(json.dumps({**model_config, "dtype": dtype}, indent=2))
    return path


def _describe(overrides: Mapping[str, Any], conditional: bool) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The text config, the whole config.json and the state dict's shapes, as transformers has them."""
    import torch
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

    text = Llama4TextConfig(**{**SMALL, **overrides})
    with torch.device("meta"):
        model: Any
        if conditional:
            whole = Llama4Config(text_config=text.to_dict(), vision_config=dict(VISION), image_token_index=3)
            model = Llama4ForConditionalGeneration(whole)
        else:
            model = Llama4ForCausalLM(text)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return text.to_dict(), {**model.config.to_dict(), "architectures": [type(model).__name__]}, shapes


def _random(name: str, shape: tuple[int, ...], std: float, generator: Any) -> Any:
    """Normal weights; norms near 1 but not 1, so that leaving one out shows."""
    import torch

    noise = torch.randn(shape, generator=generator)
    return 1.0 + 0.1 * noise if "norm" in name and name.endswith("weight") else std * noise


def unfuse(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Split stacked experts [E, in, out] into one linear layer's weight [out, in] an expert."""
    split: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if not stem.endswith(".experts"):
            split[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {kind: matrix}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2, dim=-1), strict=True))
            for part, weight in parts.items():
                split[f"{stem}.{expert}.{part}.weight"] = weight.T.contiguous()
    return split


def save_sharded(path: Path, tensors: Mapping[str, Any], shards: int) -> None:
    """Save as ``model.safetensors``, or as that many files with ``model.safetensors.index.json``."""
    from safetensors.torch import save_file

    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
