"""LoRA adapters that do not fit, do not say what they are, or are not only numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile import bases
from tests.hostile.case import Damage, Family, cases, harmless
from tests.hostile.files import (
    cut,
    edit_json,
    folder_instead,
    link,
    pipe,
    read_arrays,
    remove,
    sparse,
    text,
    write_safetensors,
)

FOLDER = "adapter"
CONFIG, WEIGHTS = f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"], "fan_in_fan_out": False,
    "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True,
}  # fmt: skip


def base(folder: Path) -> None:
    """The checkpoint, with an adapter in a folder beside it within the input."""
    folder.mkdir(parents=True)
    bases.checkpoint(folder / "model")
    (folder / FOLDER).mkdir()
    (folder / CONFIG).write_text(json.dumps(SETTINGS))
    random = np.random.default_rng(0)
    pair = {A: random.normal(0, 0.1, (4, 32)).astype(np.float16), B: random.normal(0, 0.1, (32, 4)).astype(np.float16)}
    second = {name.replace("layers.0", "layers.1"): factor for name, factor in pair.items()}
    write_safetensors(folder / WEIGHTS, {**pair, **second})


def bad(key: str, value: Any, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return edit_json(CONFIG, lambda config: config.update({key: value})), ("adapter_config.json", *(names or (key,)))


def tensors(change: Callable[[dict[str, np.ndarray]], object], *names: str) -> tuple[Damage, tuple[str, ...]]:
    def damage(folder: Path) -> None:
        content = read_arrays(folder / WEIGHTS)
        change(content)
        write_safetensors(folder / WEIGHTS, content)

    return damage, ("adapter_model.safetensors", *names)


def put(name: str, value: float) -> tuple[Damage, tuple[str, ...]]:
    def change(content: dict[str, np.ndarray]) -> None:
        content[name].reshape(-1)[0] = value

    return tensors(change, name, "NaN")


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / FOLDER / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R.")


FAMILY = Family(
    base=base,
    command=(
        "convert",
        "{input}/model",
        "--output",
        "{out}",
        "--recipe",
        "none",
        "--adapter",
        f"{{input}}/{FOLDER}",
    ),
    cases={
        "a rank that takes for ever to find": harmless(
            edit_json(CONFIG, lambda config: config.update(rank_pattern={"(a*)*(a*)*(.*.*)*x": 4}))
        ),
        **cases(
            {
                "rank of 4e9": bad("r", 4 * 10**9, "r is"),
                "rank of 0": bad("r", 0, "r is"),
                "rank of -1": bad("r", -1, "r is"),
                "rank of NaN": bad("r", math.nan, "r must"),
                "rank of text": bad("r", "4", "r must"),
                "no rank": (edit_json(CONFIG, lambda c: c.pop("r")), ("adapter_config.json", "r is missing")),
                "alpha of NaN": bad("lora_alpha", math.nan),
                "alpha of infinity": bad("lora_alpha", math.inf),
                "alpha of 1e300": bad("lora_alpha", 1e300),
                "alpha of -8": bad("lora_alpha", -8),
                "alpha of text": bad("lora_alpha", "8"),
                "another method": bad("peft_type", "PREFIX_TUNING"),
                "a method that is a list": bad("peft_type", []),
                "biases": bad("bias", "all"),
                "biases of an object": bad("bias", {}),
                "DoRA": bad("use_dora", True),
                "layers replicated": bad("layer_replication", [[0, 2], [0, 2]]),
                "a start that is code": bad("init_lora_weights", "__import__('os').system('x')"),
                "a start that is a list": bad("init_lora_weights", []),
                "a setting that is unknown": bad("auto_execute", "touch canary"),
                "targets of a number": bad("target_modules", 3),
                "targets of numbers": bad("target_modules", [1, 2]),
                "a million targets": bad("target_modules", ["q"] * 10**6),
                "rank pattern is a list": bad("rank_pattern", []),
                "a rank of an expression that is none": bad("rank_pattern", {"(((": 4}),
                "a rank of 0 by pattern": bad("rank_pattern", {"q_proj": 0}),
                "a rank that differs by pattern": (
                    edit_json(CONFIG, lambda c: c.update(rank_pattern={"q_proj": 8})),
                    ("lora_A", "q_proj"),
                ),
                "an alpha of NaN by pattern": bad("alpha_pattern", {"q_proj": math.nan}),
                "100,001 patterns": bad("alpha_pattern", {f"m{i}": 1 for i in range(100_001)}),
                "saved modules of objects": bad("modules_to_save", [{}]),
                "a key twice": (text(CONFIG, '{"r": 1, "r": 2}'), ("adapter_config.json", "twice")),
                "nested": (text(CONFIG, '{"a":' * 100_000), ("adapter_config.json", "nested")),
                "not JSON": (text(CONFIG, "r: 4"), ("adapter_config.json", "not valid JSON")),
                "a terabyte": (sparse(CONFIG, 1 << 40), ("adapter_config.json", "bytes")),
                "a pipe": (pipe(CONFIG), ("adapter_config.json",)),
                "a folder": (folder_instead(CONFIG), ("adapter_config.json",)),
                "weights are a pickle": (as_pickle, ("adapter_model.bin", "pickle")),
                "weights are absent": (remove(WEIGHTS), ("adapter_model.safetensors",)),
                "weights are cut": (cut(WEIGHTS, -1), ("adapter_model.safetensors", "truncated")),
                "weights are a pipe": (pipe(WEIGHTS), ("adapter_model.safetensors",)),
                "weights are a device": (link(WEIGHTS, "/dev/zero"), ("adapter_model.safetensors",)),
                "no tensors": tensors(lambda t: t.clear()),
                "a half pair": tensors(lambda t: t.pop(A), "lora_"),
                "the other half": tensors(lambda t: t.pop(B), "lora_"),
                "another rank": tensors(lambda t: t.update({A: t[A][:2], B: t[B][:, :2]}), "lora_"),
                "ranks that differ": tensors(lambda t: t.update({B: t[B][:, :3]}), "lora_"),
                "another width": tensors(lambda t: t.update({A: t[A][:, :16]}), "lora_"),
                "another height": tensors(lambda t: t.update({B: t[B][:16]}), "lora_"),
                "three axes": tensors(lambda t: t.update({A: t[A].reshape(4, 32, 1)}), "lora_"),
                "no axes": tensors(lambda t: t.update({A: t[A][0, 0].reshape(())}), "lora_"),
                "no elements": tensors(lambda t: t.update({A: t[A][:0], B: t[B][:, :0]}), "lora_"),
                "integers": tensors(lambda t: t.update({A: t[A].astype(np.int32)}), A),
                "FP8": tensors(lambda t: t.update({A: t[A].astype(np.uint8)}), A),
                "of a layer that is not there": tensors(
                    lambda t: t.update({k.replace("layers.0", "layers.99"): t.pop(k) for k in (A, B)}), "layers.99"
                ),
                "of a module that is not there": tensors(
                    lambda t: t.update({k.replace("q_proj", "w_proj"): t.pop(k) for k in (A, B)}), "w_proj"
                ),
                "of no prefix": tensors(lambda t: t.update(x=t.pop(A)), "'x'"),
                "nested 10,000 deep": tensors(
                    lambda t: t.update({k.replace(".lora", ".base_layer" * 10_000 + ".lora"): t.pop(k) for k in (A, B)})
                ),
                "a name of two lines": tensors(lambda t: t.update({"a\nb": t.pop(A)})),
                "NaN in A": put(A, math.nan),
                "NaN in B": put(B, math.nan),
                "infinity in A": put(A, math.inf),
                "infinity in B": put(B, -math.inf),
                "a magnitude": tensors(
                    lambda t: t.update({f"{MODULE}.lora_magnitude_vector": t[B][:, 0]}), "magnitude"
                ),
            }
        ),
    },
)
