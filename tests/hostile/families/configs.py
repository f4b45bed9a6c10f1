"""config.json with values no model has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.bases import CONFIG, checkpoint
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import edit_json, sparse, text

FILE = "config.json"
SIZES = ("hidden_size", "num_hidden_layers", "num_local_experts", "max_position_embeddings", "attention_chunk_size")
# What JSON can say where a count is due.
NOT_COUNTS = {"-1": -1, "0": 0, "1e9 and one": 10**9 * 4, "10**400": 10**400, "NaN": math.nan, "text": "8", "1.5": 1.5}
RECIPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
}


def having(**values: Any) -> Callable[[Path], None]:
    return edit_json(FILE, lambda config: config.update(values))


def bad(key: str, value: Any, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return having(**{key: value}), (FILE, key, *names)


def rope(**values: Any) -> tuple[Damage, tuple[str, ...]]:
    changed = {**RECIPE, **values}
    return having(rope_parameters=changed), (FILE, "rope_parameters", next(iter(values)))


def raw(change: Callable[[str], str], *names: str) -> tuple[Damage, tuple[str, ...]]:
    return text(FILE, change(json.dumps(CONFIG)).encode()), (FILE, *names)


FAMILY = Family(
    base=checkpoint,
    cases=cases(
        {
            "1e9 layers": bad("num_hidden_layers", 10**9),
            **{f"{key} is {what}": bad(key, value) for key in SIZES for what, value in NOT_COUNTS.items()},
            "1e9 layers as a float": bad("num_hidden_layers", 1e9, "integer"),
            "1e9 experts": bad("num_local_experts", 10**9),
            "more layers than tensors": (having(num_hidden_layers=1000), ("model.layers.2.", "is missing")),
            "layers times experts": (
                having(num_hidden_layers=1024, num_local_experts=4096),
                (FILE, "num_local_experts", "experts in all"),
            ),
            "more experts a token than experts": bad("num_experts_per_tok", 3),
            "no experts a token": bad("num_experts_per_tok", 0),
            "layers is true": bad("num_hidden_layers", True),
            "layers is null": bad("num_hidden_layers", None),
            "layers is a list": bad("num_hidden_layers", [2]),
            "layers is an object": bad("num_hidden_layers", {"a": 2}),
            "hidden size of 2**31": bad("hidden_size", 2**31),
            "hidden size of another model": (having(hidden_size=64), ("model.embed_tokens.weight", "[64, 32]")),
            "an odd head": bad("head_dim", 15, "even"),
            "heads that do not divide": (having(num_attention_heads=3, num_key_value_heads=2), (FILE, "multiple")),
            "no heads": bad("num_attention_heads", 0),
            "epsilon is NaN": bad("rms_norm_eps", math.nan),
            "epsilon is infinite": bad("rms_norm_eps", math.inf),
            "epsilon is negative": bad("rms_norm_eps", -1e-5),
            "epsilon is zero": bad("rms_norm_eps", 0),
            "epsilon is more than float32 holds": bad("rms_norm_eps", 1e39),
            "epsilon is less than float32 holds": bad("rms_norm_eps", 1e-39),
            "a chunk of 2**30": bad("attention_chunk_size", 2**30),
            "2**26 positions to rotate": (
                having(layer_types=["full_attention"] * 2, max_position_embeddings=2**26),
                (FILE, "max_position_embeddings"),
            ),
            "epsilon is text": bad("rms_norm_eps", "1e-5"),
            "epsilon is 10**400": bad("rms_norm_eps", 10**400),
            "theta is NaN": rope(rope_theta=math.nan),
            "theta is -1": rope(rope_theta=-1),
            "theta is a list": rope(rope_theta=[1]),
            "a rope of an unknown type": rope(rope_type="yarn"),
            "a rope's type is a number": rope(rope_type=3),
            "a rope's type is a list": rope(rope_type=["llama3"]),
            "a rope's factor is 0": rope(factor=0),
            "a rope's factor is NaN": rope(factor=math.nan),
            "a rope's frequencies are the wrong way round": rope(low_freq_factor=9),
            "a rope a layer": rope(full_attention={"rope_theta": 1}),
            "a rope is a list": bad("rope_parameters", []),
            "a rope's length is negative": rope(original_max_position_embeddings=-1),
            "layer_types too short": bad("layer_types", ["full_attention"]),
            "layer_types unknown": bad("layer_types", ["full_attention", "mamba"]),
            "layer_types of lists": bad("layer_types", [[], []]),
            "layer_types is text": bad("layer_types", "full_attention"),
            "no_rope_layers of 2": bad("no_rope_layers", [2, 2]),
            "no_rope_layers of NaN": bad("no_rope_layers", [math.nan, 1]),
            "no_rope_layers of a million": bad("no_rope_layers", ["x"] * 10**6),
            "moe_layers out of range": bad("moe_layers", [2]),
            "moe_layers negative": bad("moe_layers", [-1]),
            "moe_layers nested": bad("moe_layers", [[0]]),
            "moe step of 0": bad("interleave_moe_layer_step", 0),
            "rope interval of 0": bad("no_rope_layer_interval", 0),
            "an activation that is code": bad("hidden_act", "__import__('os').system('x')"),
            "another model": bad("model_type", "llama"),
            "no model": bad("model_type", None),
            "model type is an object": bad("model_type", {"a": []}),
            "another architecture": bad("architectures", ["LlamaForCausalLM"]),
            "architectures is text": bad("architectures", "Llama4ForCausalLM"),
            "architectures of numbers": bad("architectures", [[1]]),
            "a multimodal one without its text": (having(model_type="llama4"), (FILE, "text_config", "missing")),
            "text_config is a list": (having(model_type="llama4", text_config=[]), (FILE, "text_config")),
            "text_config of another model": (
                having(model_type="llama4", text_config={"model_type": "gpt2"}),
                (FILE, "text_config.model_type"),
            ),
            "token ids out of range": bad("bos_token_id", -5),
            "token ids of text": bad("eos_token_id", ["2"]),
            "token ids of NaN": bad("eos_token_id", math.nan),
            "token id of 2**40": bad("pad_token_id", 2**40),
            "a million token ids, one wrong": bad("eos_token_id", [2] * 10**6 + [None, "x"]),
            "tie is text": bad("tie_word_embeddings", "yes"),
            "bias is 1": bad("attention_bias", 1),
            "tuning is -1": bad("attn_temperature_tuning", -1),
            "attn_scale is infinite": bad("attn_scale", -math.inf),
            "floor_scale is 0": bad("floor_scale", 0),
            "partial rotation": bad("partial_rotary_factor", 0.5),
            "partial rotation is an object": bad("partial_rotary_factor", {}),
            "a key twice": raw(lambda c: c[:-1] + ', "vocab_size": 1}', "vocab_size", "twice"),
            "nested 100,000 deep": raw(lambda c: '{"a":' * 100_000, "nested too deeply"),
            "lists nested 500 deep": bad("rope_parameters", json.loads("[" * 500 + "]" * 500)),
            "a list": raw(lambda c: f"[{c}]", "object"),
            "empty": raw(lambda c: "", "not valid JSON"),
            "Python": raw(lambda c: repr(CONFIG), "not valid JSON"),
            "YAML": raw(lambda c: "!!python/object/apply:os.system [x]", "not valid JSON"),
            "a number of 100,000 digits": raw(lambda c: c[:-1] + ', "x": ' + "9" * 100_000 + "}", "not valid JSON"),
            "a terabyte of zeros": (sparse(FILE, 1 << 40), (FILE, "bytes")),
            "9 MB of empty lists": raw(lambda c: '{"a": [' + "[]," * 3_000_000 + "[]]}"),
            "UTF-16": (text(FILE, json.dumps(CONFIG).encode("utf-16")), (FILE, "not UTF-8")),
            "NUL bytes": (text(FILE, bytes(4096)), (FILE, "not valid JSON")),
        }
    ),
)
