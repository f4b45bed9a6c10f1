"""How a checkpoint says that it is quantized, and the side tensors of quantized weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.case import Damage, Family, cases, harmless
from tests.hostile.files import SINGLE, edit_json, sparse, text
from tests.hostile.quantized_base import (
    MODULE,
    ROWS,
    WEIGHT,
    fbgemm_checkpoint,
    float_checkpoint,
    modelopt_checkpoint,
    packed_checkpoint,
    quantization,
    scheme,
    tensors,
    weights,
)

CONFIG, MODELOPT = "config.json", "hf_quant_config.json"
EVIL = "re:" + "(a+)+" * 3 + "$"


def config(key: str, value: Any, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return quantization(lambda content: content.update({key: value})), (CONFIG, *(names or (key,)))


def scheme_of(key: str, value: Any, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return weights(**{key: value}), (*(names or (CONFIG, key)),)


def side(name: str, change: Callable[[np.ndarray], np.ndarray]) -> tuple[Damage, tuple[str, ...]]:
    """Another side tensor."""
    return tensors(lambda content: content.update({name: change(content[name])})), (SINGLE, name)


def put(name: str, value: int | float) -> tuple[Damage, tuple[str, ...]]:
    """One value of a tensor that is not finite."""

    def change(content: dict[str, np.ndarray]) -> None:
        content[name].reshape(-1)[0] = value

    return tensors(change), (SINGLE, MODULE, "NaN")


def gone(name: str) -> tuple[Damage, tuple[str, ...]]:
    return tensors(lambda content: content.pop(name)), (SINGLE, name)


def codes_gone() -> tuple[Damage, tuple[str, ...]]:
    """Codes without scales: then they are a weight of a type that weights do not have."""
    return tensors(lambda content: content.pop(f"{WEIGHT}_scale")), (SINGLE, WEIGHT, "F8_E4M3")


def more(name: str, array: np.ndarray) -> tuple[Damage, tuple[str, ...]]:
    return tensors(lambda content: content.update({name: array})), (SINGLE, name)


CASES = {
    "an unknown method": config("quant_method", "gptq"),
    "a method that is code": config("quant_method", "__import__('os')"),
    "a method that is a list": config("quant_method", ["compressed-tensors"]),
    "no method": config("quant_method", None),
    "a list": (edit_json(CONFIG, lambda c: c.update(quantization_config=[])), (CONFIG, "quantization_config")),
    "text": (edit_json(CONFIG, lambda c: c.update(quantization_config="fp8")), (CONFIG, "quantization_config")),
    "said in two ways": (edit_json(CONFIG, lambda c: c.update(compression_config={})), (CONFIG, "compression_config")),
    "an unknown status": config("quantization_status", "initialized"),
    "sparse": config("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
    "no groups": config("config_groups", {}),
    "groups are a list": config("config_groups", []),
    "a group is null": config("config_groups", {"g": None}),
    "a group with a control character": config("config_groups", {"g\x7f": []}),
    "a thousand groups": config("config_groups", {f"g{i}": scheme()["config_groups"]["group_0"] for i in range(1000)}),
    "targets are a number": config("config_groups", {"g": {"targets": 3, "weights": {}}}, "targets"),
    "targets of numbers": config("config_groups", {"g": {"targets": [3], "weights": {}}}, "targets"),
    "no weights": config("config_groups", {"g": {"targets": ["Linear"], "weights": None}}, MODULE),
    "for other modules": config("config_groups", {"g": {"targets": ["Conv2d"], "weights": {}}}, MODULE),
    "a hundred of them": config("ignore", [f"re:.*{'(a|b|ab)*' * i}$" for i in range(100)]),
    "an expression that is none": config("ignore", ["re:((("]),
    "an expression of 100,000 characters": config("ignore", ["re:" + "(a" * 50_000]),
    "a back-reference": config("ignore", [r"re:(.*)\1\1\1x"]),
    "10,000 expressions": config("ignore", [f"re:x{i}" for i in range(10_000)]),
    "ignored, yet quantized": config("ignore", [MODULE], MODULE),
    "ignore is text": config("ignore", "lm_head"),
    "ignore of numbers": config("ignore", [1]),
    "ignore of null": config("ignore", [None]),
    "3 bits": scheme_of("num_bits", 3),
    "-1 bits": scheme_of("num_bits", -1),
    "4e9 bits": scheme_of("num_bits", 4 * 10**9),
    "bits are NaN": scheme_of("num_bits", math.nan),
    "bits are text": scheme_of("num_bits", "4"),
    "floats in integers": scheme_of("type", "float", CONFIG),
    "an unknown strategy": scheme_of("strategy", "random"),
    "a strategy that is a list": scheme_of("strategy", []),
    "groups of 0": scheme_of("group_size", 0),
    "groups of -1": scheme_of("group_size", -1),
    "groups of 7": scheme_of("group_size", 7),
    "groups of 2**31": scheme_of("group_size", 2**31),
    "groups of NaN": scheme_of("group_size", math.nan),
    "symmetric is text": scheme_of("symmetric", "yes"),
    "zero points that are missing": scheme_of("symmetric", False, CONFIG, f"{WEIGHT}_zero_point"),
    "an unknown format": config("format", "marlin-24"),
    "a format that is a list": config("format", []),
    "no codes": gone(f"{WEIGHT}_packed"),
    "no scales": gone(f"{WEIGHT}_scale"),
    "no shape": (tensors(lambda content: content.pop(f"{WEIGHT}_shape")), (CONFIG, f"{WEIGHT}_shape")),
    "codes of half the rows": side(f"{WEIGHT}_packed", lambda a: a[:16]),
    "codes of another type": side(f"{WEIGHT}_packed", lambda a: a.astype(np.float32)),
    "scales of another shape": side(f"{WEIGHT}_scale", lambda a: a.reshape(1, ROWS)),
    "scales of integers": side(f"{WEIGHT}_scale", lambda a: a.astype(np.int32)),
    "a shape of other numbers": side(f"{WEIGHT}_shape", lambda a: a * 2),
    "a shape of -1": side(f"{WEIGHT}_shape", lambda a: -a),
    "a shape of three": side(f"{WEIGHT}_shape", lambda a: np.array([1, 2, 3], np.int64)),
    "groups out of range": (
        tensors(lambda c: c.update({f"{WEIGHT}_g_idx": np.full(32, 7, np.int32)})),
        (SINGLE, MODULE),
    ),
    "negative groups": (
        tensors(lambda c: c.update({f"{WEIGHT}_g_idx": np.full(32, -1, np.int32)})),
        (SINGLE, MODULE),
    ),
    "groups of another length": more(f"{WEIGHT}_g_idx", np.zeros(31, np.int32)),
    "a weight beside its codes": more(WEIGHT, np.zeros((ROWS, ROWS), np.float16)),
    "scales of a norm": (
        tensors(lambda c: c.update({"model.norm.weight_scale": np.ones((1,), np.float32)})),
        (CONFIG, "model.norm"),
    ),
    "a side tensor of nothing": more("model.layers.9.self_attn.q_proj.weight_scale", np.ones(1, np.float32)),
    "a scale that is NaN": put(f"{WEIGHT}_scale", math.nan),
    "a scale that is infinite": put(f"{WEIGHT}_scale", math.inf),
}
SLOW = {
    "an expression that takes for ever": [EVIL],
    "nested repeats": ["re:" + "(" * 90 + "m" + ")*" * 90 + "x"],
    "repeated 10**9 times": ["re:(.{0,1000000000}){0,1000000000}x"],
}
FAMILY = Family(
    base=packed_checkpoint,
    cases={
        **cases(CASES),
        **{name: harmless(quantization(lambda c, p=p: c.update(ignore=p))) for name, p in SLOW.items()},  # type: ignore[misc]
    },
)


def strategies() -> dict[str, tuple[Damage, tuple[str, ...]]]:
    """Of FP8."""
    values: dict[str, Any] = {"unknown": "x", "a list": [], "a number": 3}
    return {f"a strategy that is {what}": scheme_of("strategy", value) for what, value in values.items()}


FLOATS = Family(
    base=float_checkpoint,
    real=False,
    cases=cases(
        {
            "a code that is NaN": put(WEIGHT, 0x7F),
            "a code that is -NaN": put(WEIGHT, 0xFF),
            "a scale that is NaN": put(f"{WEIGHT}_scale", math.nan),
            "a scale that is infinite": put(f"{WEIGHT}_scale", math.inf),
            "a scale that is -infinite": put(f"{WEIGHT}_scale", -math.inf),
            **strategies(),
            "a strategy that is null": scheme_of("strategy", None, SINGLE, f"{WEIGHT}_scale"),
            "groups without a size": (weights(strategy="group"), (CONFIG, "group_size")),
            "a size that is a list": (weights(strategy=None, group_size=[]), (CONFIG, "group_size")),
            "blocks without sizes": (weights(strategy="block", block_structure=None), (CONFIG, "block_structure")),
            "blocks of 0": (weights(strategy="block", block_structure=[0, 0]), (CONFIG, "block_structure")),
            "blocks of -1": (weights(strategy="block", block_structure=[-1, 128]), (CONFIG, "block_structure")),
            "blocks of one number": (weights(strategy="block", block_structure=[128]), (CONFIG, "block_structure")),
            "blocks of text": (weights(strategy="block", block_structure=["a", "b"]), (CONFIG, "block_structure")),
            "16 bits": scheme_of("num_bits", 16),
            "bits are an object": scheme_of("num_bits", {}),
            "a type that is unknown": scheme_of("type", "complex"),
            "a type that is another": scheme_of("type", "int", SINGLE, WEIGHT),
            "codes are floats": side(WEIGHT, lambda a: a.astype(np.float16)),
            "codes are cut": side(WEIGHT, lambda a: a[:-1]),
            "scales are codes": side(f"{WEIGHT}_scale", lambda a: a.astype(np.uint8)),
            "too few scales": side(f"{WEIGHT}_scale", lambda a: a[:-1]),
            "scales of four axes": side(f"{WEIGHT}_scale", lambda a: a.reshape(ROWS, 1, 1, 1)),
            "no scales": codes_gone(),
            "no codes": gone(WEIGHT),
            "scales of a norm": (
                tensors(lambda c: c.update({"model.norm.weight_scale": np.ones((1,), np.float32)})),
                (CONFIG, "model.norm"),
            ),
            "scales of experts": more(
                "model.layers.0.feed_forward.experts.gate_up_proj_scale", np.ones((1,), np.float32)
            ),
        }
    ),
)
EXPERTS = "model.layers.0.feed_forward.experts.gate_up_proj"


def norm_in_fp8(content: dict[str, np.ndarray]) -> None:
    content["model.norm.weight"] = np.full(32, 0x38, np.uint8)
    content["model.norm.weight_scale"] = np.ones((32, 1), np.float32)


FBGEMM = Family(
    base=fbgemm_checkpoint,
    real=False,
    cases=cases(
        {
            "a code that is NaN": put(WEIGHT, 0x7F),
            "a scale that is NaN": put(f"{WEIGHT}_scale", math.nan),
            "a scale that is infinite": put(f"{WEIGHT}_scale", math.inf),
            "scales of a norm": more("model.norm.weight_scale", np.ones((1,), np.float32)),
            "scales of a norm of a layer": more(
                "model.layers.0.input_layernorm.weight_scale", np.ones((32, 1), np.float32)
            ),
            "scales of experts": (
                tensors(lambda c: c.update({f"{EXPERTS}_scale": np.ones((1,), np.float32)})),
                (SINGLE, EXPERTS),
            ),
            "scales of a matrix that is not quantized": (
                tensors(lambda c: c.update({"lm_head.weight_scale": np.ones((64, 1), np.float32)})),
                (SINGLE, "lm_head"),
            ),
            "a norm in FP8": (tensors(norm_in_fp8), (SINGLE, "model.norm.weight_scale")),
            "scales of nothing": more("x_scale", np.ones((64, 1), np.float32)),
            "scales of another shape": side(f"{WEIGHT}_scale", lambda a: a.T),
            "one scale": side(f"{WEIGHT}_scale", lambda a: a[:1]),
            "no axes": side(f"{WEIGHT}_scale", lambda a: a[0, 0].reshape(())),
            "integer scales": side(f"{WEIGHT}_scale", lambda a: a.astype(np.int32)),
            "no scales": codes_gone(),
            "no codes": gone(WEIGHT),
            "codes are floats": side(WEIGHT, lambda a: a.astype(np.float16)),
            "codes are signed": side(WEIGHT, lambda a: a.astype(np.int8)),
            "codes of three axes": side(WEIGHT, lambda a: a.reshape(1, ROWS, ROWS)),
            "codes the other way round": side(WEIGHT, lambda a: a.reshape(64, 16)),
            "another method": config("quant_method", "fbgemm_int4"),
            "a method in capitals": config("quant_method", "FBGEMM_FP8"),
            "said twice": (
                edit_json(CONFIG, lambda c: c.update(compression_config=scheme())),
                (CONFIG, "compression_config"),
            ),
        }
    ),
)


def described(change: Callable[[dict[str, Any]], object], *names: str) -> tuple[Damage, tuple[str, ...]]:
    return edit_json(MODELOPT, lambda content: change(content["quantization"])), (MODELOPT, *names)


def fill(value: Any) -> Callable[[Path], None]:
    return edit_json(MODELOPT, lambda content: content.update(quantization=value))


MODELOPT_FAMILY = Family(
    base=modelopt_checkpoint,
    real=False,
    cases={
        "a pattern that takes long": harmless(
            edit_json(MODELOPT, lambda content: content["quantization"].update(exclude_modules=["*a" * 2000 + "*"]))
        ),
        **cases(
            {
                "an algorithm that is unknown": described(lambda q: q.update(quant_algo="INT2"), "quant_algo"),
                "an algorithm that is a list": described(lambda q: q.update(quant_algo=[]), "quant_algo"),
                "an algorithm that is an object": described(lambda q: q.update(quant_algo={}), "quant_algo"),
                "no algorithm": described(lambda q: q.pop("quant_algo"), "quant_algo"),
                "another algorithm": (fill({"quant_algo": "NVFP4", "exclude_modules": []}), (SINGLE, WEIGHT)),
                "excluded, yet quantized": described(lambda q: q.update(exclude_modules=["model.layers.0*"]), MODULE),
                "10,000 patterns": described(
                    lambda q: q.update(exclude_modules=[f"x{i}*" for i in range(10_000)]), "exclude_modules"
                ),
                "patterns are text": described(lambda q: q.update(exclude_modules="lm_head"), "exclude_modules"),
                "patterns are numbers": described(lambda q: q.update(exclude_modules=[1]), "exclude_modules"),
                "quantization is a list": (fill([]), (MODELOPT, "quantization")),
                "quantization is text": (fill("FP8"), (MODELOPT, "quantization")),
                "not JSON": (text(MODELOPT, "x"), (MODELOPT, "not valid JSON")),
                "a list": (text(MODELOPT, "[]"), (MODELOPT, "object")),
                "nested": (text(MODELOPT, '{"a":' * 100_000), (MODELOPT, "nested")),
                "a terabyte": (sparse(MODELOPT, 1 << 40), (MODELOPT, "bytes")),
                "a code that is NaN": put(WEIGHT, 0x7F),
                "a scale that is NaN": put(f"{WEIGHT}_scale", math.nan),
                "a scale of another shape": side(f"{WEIGHT}_scale", lambda a: np.full((3, 3), 0.1, np.float32)),
                "scales of a norm": more("model.norm.weight_scale", np.ones((), np.float32)),
                "codes are integers": side(WEIGHT, lambda a: a.astype(np.int32)),
                "no scale": codes_gone(),
            }
        ),
    },
)
