"""Quantized checkpoints in Hugging Face's layout: the same tiny model with q_proj of its first layer in codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.bases import checkpoint
from tests.hostile.files import SINGLE, edit_json, read_arrays, write_safetensors

MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"
ROWS = DEPTH = 32


def scheme(**weights: Any) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}}},
    }  # fmt: skip


def int4() -> dict[str, np.ndarray]:
    return {
        f"{WEIGHT}_packed": np.full((ROWS, DEPTH // 8), 0x12345678, np.int32),
        f"{WEIGHT}_scale": np.full((ROWS, 1), 0.01, np.float16),
        f"{WEIGHT}_shape": np.array([ROWS, DEPTH], np.int64),
    }


def fp8(scales: tuple[int, ...] = (ROWS, 1)) -> dict[str, np.ndarray]:
    return {WEIGHT: np.full((ROWS, DEPTH), 0x38, np.uint8), f"{WEIGHT}_scale": np.full(scales, 0.01, np.float32)}


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
FBGEMM: Mapping[str, Any] = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head"],
}
MODELOPT: Mapping[str, Any] = {
    "producer": {"name": "modelopt", "version": "0.47"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}


def _write(folder: Path, config: Mapping[str, Any] | None, codes: Mapping[str, np.ndarray]) -> None:
    checkpoint(folder)
    tensors = read_arrays(folder / SINGLE)
    del tensors[WEIGHT]
    write_safetensors(folder / SINGLE, {**tensors, **codes})
    if config is not None:
        edit_json("config.json", lambda content: content.update(quantization_config=config))(folder)


def packed_checkpoint(folder: Path) -> None:
    """compressed-tensors, INT4 in groups."""
    _write(folder, scheme(), int4())


def float_checkpoint(folder: Path) -> None:
    """compressed-tensors, FP8 by channel."""
    _write(folder, {**scheme(**FLOAT8), "format": "float-quantized"}, fp8())


def fbgemm_checkpoint(folder: Path) -> None:
    """transformers' FBGEMM FP8."""
    _write(folder, FBGEMM, fp8())


def modelopt_checkpoint(folder: Path) -> None:
    """ModelOpt's FP8, described in a file of its own."""
    _write(folder, None, fp8(()))
    (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage: change ``quantization_config``."""
    return edit_json("config.json", lambda content: change(content["quantization_config"]))


def weights(**values: Any) -> Callable[[Path], None]:
    """Damage: change the scheme of weights."""
    return quantization(lambda config: config["config_groups"]["group_0"]["weights"].update(values))


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Damage: change the tensors."""

    def damage(folder: Path) -> None:
        content = read_arrays(folder / SINGLE)
        change(content)
        write_safetensors(folder / SINGLE, content)

    return damage
