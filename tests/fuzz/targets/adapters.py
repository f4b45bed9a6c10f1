"""LoRA adapters: adapter_config.json, its patterns, and the names and shapes of adapter_model.safetensors."""

from __future__ import annotations

import json
from typing import Any

from l4convert.checkpoint.adapters.config import read_adapter_config
from l4convert.checkpoint.adapters.contents import open_adapter
from tests.fuzz.target import OneFile, Target

_config = OneFile("adapter_config.json")
_weights = OneFile("adapter_model.safetensors")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj", "v_proj"],
    "use_rslora": False, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}, "modules_to_save": None,
    "fan_in_fan_out": False, "use_dora": False, "init_lora_weights": True, "base_model_name_or_path": "x",
    "target_parameters": None, "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "layers_to_transform": None,
}  # fmt: skip
(_weights.path.parent / "adapter_config.json").write_text(json.dumps(CONFIG))


def weights() -> list[bytes]:
    """Headers of adapters, which are followed by zeros."""
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
    b = {"dtype": "F32", "shape": [2, 4], "data_offsets": [32, 64]}
    embedding = "base_model.model.model.embed_tokens"
    return [
        json.dumps({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}).encode(),
        json.dumps({f"{embedding}.lora_embedding_A": a, f"{embedding}.lora_embedding_B": b}).encode(),
        json.dumps({f"{module}.base_layer.lora_A.weight": a, "base_model.model.lm_head.weight": b}).encode(),
    ]


def parse_weights(data: bytes) -> None:
    """A header, with its length before it and data behind it."""
    open_adapter(_weights(len(data).to_bytes(8, "little") + data + bytes(64)).parent)


ADAPTER_CONFIG = Target(
    lambda data: read_adapter_config(_config(data)),
    lambda: [
        json.dumps(CONFIG).encode(),
        json.dumps(
            {**CONFIG, "target_modules": "all-linear", "target_parameters": ["mlp.experts.gate_up_proj"]}
        ).encode(),
        json.dumps({**CONFIG, "target_modules": r".*\.(q|v)_proj", "modules_to_save": ["lm_head"]}).encode(),
    ],
    tuple(f'"{key}"' for key in CONFIG),
    form="json",
)
ADAPTER_WEIGHTS = Target(
    parse_weights, weights, (".lora_A.weight", ".lora_B.weight", ".base_layer", '"dtype"', '"shape"'), form="json"
)
