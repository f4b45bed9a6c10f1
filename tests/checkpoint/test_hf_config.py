from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.config import DecoderConfig, LayerConfig, RopeScaling
from l4convert.checkpoint.hf_config import MAX_CONFIG_BYTES, read_config
from tests.checkpoint.refusals import assert_refused

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# As published with meta-llama/Llama-4-Scout-17B-16E (transformers 4.51), less keys that say nothing about the decoder.
OLD_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        "_attn_implementation_autoset": True,
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "attn_scale": 0.1,
        "attn_temperature_tuning": 4,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "floor_scale": 8192,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 10485760,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "pad_token_id": 200018,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "llama4_vision_model"},
}


def read(folder: Path, config: Any) -> DecoderConfig:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(text)
    return read_config(folder / "config.json")


def read_text(folder: Path, **keys: Any) -> DecoderConfig:
    return read(folder, {"model_type": "llama4_text", **keys})


def test_scout_as_published(tmp_path: Path) -> None:
    config = read(tmp_path, OLD_SCOUT)
    assert config.layers == tuple(LayerConfig(i % 4 != 3, i % 4 != 3, True) for i in range(48))
    assert config.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    assert config.rope_theta == 500000.0
    assert config.attn_temperature_tuning is True
    assert config.eos_token_ids == (200001, 200007, 200008)
    assert (config.bos_token_id, config.pad_token_id, config.max_position_embeddings) == (200000, 200018, 10485760)


def test_maverick_interleaves(tmp_path: Path) -> None:
    text = {**OLD_SCOUT["text_config"], "num_local_experts": 128, "interleave_moe_layer_step": 2}  # type: ignore[dict-item]
    text |= {"use_qk_norm": False, "rope_scaling": None, "moe_layers": list(range(1, 48, 2))}
    config = read(tmp_path, {**OLD_SCOUT, "text_config": text})
    assert [layer.moe for layer in config.layers] == [False, True] * 24
    assert config.rope_scaling is None
    assert config.use_qk_norm is False


def same_as_transformers(ours: DecoderConfig, theirs: Any) -> None:
    """Every field, and everything derived, equals that of a Llama4TextConfig."""
    derived = {"rope_theta", "rope_scaling", "layers", "eos_token_ids"}
    for name in set(DecoderConfig.__dataclass_fields__) - derived:
        assert getattr(ours, name) == getattr(theirs, name), name
    count = theirs.num_hidden_layers
    assert [layer.rope for layer in ours.layers] == [bool(flag) for flag in theirs.no_rope_layers[:count]]
    kinds = [kind == "chunked_attention" for kind in theirs.layer_types[:count]]
    assert [layer.chunked for layer in ours.layers] == kinds
    assert [layer.moe for layer in ours.layers] == [index in theirs.moe_layers for index in range(count)]
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert ours.rope_scaling is None
    else:
        assert ours.rope_scaling == RopeScaling(*(rope[name] for name in RopeScaling.__dataclass_fields__))


@st.composite
def text_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a valid config, each of them present or left to its default."""
    layers = draw(st.integers(1, 12))
    kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    flags = st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    kinds = st.sampled_from(["chunked_attention", "full_attention"])
    rope = {**LLAMA3, "factor": draw(st.floats(1, 64)), "rope_theta": draw(st.floats(100.0, 1e6))}
    ropes = st.sampled_from([None, rope, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 10000.0}])
    optional: dict[str, st.SearchStrategy[Any]] = {
        "moe_layers": st.none() | st.lists(st.integers(0, layers - 1), unique=True),
        "interleave_moe_layer_step": st.integers(1, 3),
        "no_rope_layers": st.none() | st.just([]) | flags,
        "no_rope_layer_interval": st.integers(1, 5),
        "layer_types": st.none() | st.lists(kinds, min_size=layers, max_size=layers),
        "attention_chunk_size": st.integers(1, 9000),
        "head_dim": st.integers(1, 64).map(lambda half: 2 * half),
        "rope_parameters": ropes,
        "rope_scaling": ropes,
        "rope_theta": st.floats(100.0, 1e6),
        "use_qk_norm": st.booleans(),
        "attn_temperature_tuning": st.booleans(),
        "floor_scale": st.integers(1, 9000),
        "attn_scale": st.floats(0, 1),
        "attention_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "rms_norm_eps": st.floats(1e-7, 1e-3),
        "vocab_size": st.integers(10, 1000),
        "intermediate_size": st.integers(1, 100),
        "intermediate_size_mlp": st.integers(1, 100),
        "num_local_experts": st.integers(2, 8),
        "num_experts_per_tok": st.integers(1, 2),
        "max_position_embeddings": st.integers(1, 10**7),
        "bos_token_id": st.none() | st.integers(0, 9),
        "eos_token_id": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)),
        "pad_token_id": st.none() | st.integers(0, 9),
    }
    keys: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=optional))
    keys |= {"num_hidden_layers": layers, "num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * groups}
    return keys | {"hidden_size": keys["num_attention_heads"] * draw(st.integers(1, 16)) * 2}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=text_configs(), saved=st.booleans(), conditional=st.booleans())
def test_any_config_means_what_transformers_says(
    tmp_path: Path, keys: dict[str, Any], saved: bool, conditional: bool
) -> None:
    """Written by hand (some keys) and as transformers saves it (all keys), alone and inside a multimodal config."""
    from transformers import Llama4TextConfig

    theirs = Llama4TextConfig(**json.loads(json.dumps(keys)))
    text = theirs.to_dict() if saved else {"model_type": "llama4_text", **keys}
    ours = read(tmp_path, {"model_type": "llama4", "text_config": text} if conditional else text)
    same_as_transformers(ours, theirs)


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        (
            {"rope_scaling": {"type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_type"}}},
            "rope_theta",
            5e5,
        ),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 10000}, "rope_theta", 10000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_theta": 10000}, "rope_theta", 9.0),
        ({"rope_parameters": {}, "rope_theta": None}, "rope_theta", 500000.0),
        ({"partial_rotary_factor": 1.0}, "rope_theta", 500000.0),
        ({"attn_temperature_tuning": 0}, "attn_temperature_tuning", False),
        ({"attn_temperature_tuning": 4}, "attn_temperature_tuning", True),
        ({"eos_token_id": [5, 7]}, "eos_token_ids", (5, 7)),
        ({"eos_token_id": None}, "eos_token_ids", ()),
        ({"pad_token_id": -1}, "pad_token_id", None),
        ({"quantization_config": None}, "head_dim", 128),
        ({"num_key_value_heads": None}, "num_key_value_heads", 40),
        ({"head_dim": None, "hidden_size": 1280}, "head_dim", 32),
        ({"attention_chunk_size": None, "layer_types": ["full_attention"] * 48}, "attention_chunk_size", 131072),
        ({"floor_scale": 2.5}, "floor_scale", 2.5),
        ({"torch_dtype": "bfloat16", "architectures": None}, "vocab_size", 202048),
    ],
    ids=str,
)
def test_spellings(tmp_path: Path, keys: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(read_text(tmp_path, **keys), field) == value


def test_type_and_rope_type_mean_the_same(tmp_path: Path) -> None:
    old = {"type" if key == "rope_type" else key: value for key, value in LLAMA3.items()}
    assert read_text(tmp_path, rope_scaling=old) == read_text(tmp_path, rope_parameters=LLAMA3)


def test_lists_may_be_longer_than_the_model(tmp_path: Path) -> None:
    config = read_text(tmp_path, num_hidden_layers=2, no_rope_layers=[1, 0, 1, 0])
    assert config.layers == (LayerConfig(True, True, True), LayerConfig(False, False, True))


INTEGERS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "attention_chunk_size",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
]
NOT_SIZES = [True, 0, -1, 1.0, "8", [8], {}, math.nan, math.inf, 10**30, 10**4000]


@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("key", INTEGERS)
def test_sizes_must_be_positive_integers(tmp_path: Path, key: str, value: Any) -> None:
    assert_refused(lambda: read_text(tmp_path, **{key: value}), ["config.json: ", key])


@pytest.mark.parametrize("value", [True, 0, -1.0, "1", None, [], math.nan, math.inf, -math.inf, 10**400], ids=str)
@pytest.mark.parametrize("key", ["rms_norm_eps", "floor_scale"])
def test_numbers_must_be_finite_and_positive(tmp_path: Path, key: str, value: Any) -> None:
    assert_refused(lambda: read_text(tmp_path, **{key: value}), ["config.json: ", key])


@pytest.mark.parametrize("value", [1, 0.0, "true", None, [True]], ids=str)
@pytest.mark.parametrize("key", ["use_qk_norm", "attention_bias", "tie_word_embeddings"])
def test_switches_must_be_booleans(tmp_path: Path, key: str, value: Any) -> None:
    assert_refused(lambda: read_text(tmp_path, **{key: value}), ["config.json: ", key, "true or false"])


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a billion layers": ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "1,024"]),
    "a billion experts": ({"num_local_experts": 10**9}, ["num_local_experts", "4,096"]),
    "layers times experts": ({"num_hidden_layers": 1024, "num_local_experts": 4096}, ["num_local_experts", "131,072"]),
    "heads and kv heads": ({"num_attention_heads": 6, "num_key_value_heads": 4}, ["num_attention_heads", "multiple"]),
    "odd head_dim": ({"head_dim": 15}, ["head_dim", "even"]),
    "derived head_dim of 0": ({"head_dim": None, "hidden_size": 8}, ["head_dim"]),
    "top-k above experts": ({"num_experts_per_tok": 5, "num_local_experts": 4}, ["num_experts_per_tok", "from 1 to 4"]),
    "no chunk size": ({"attention_chunk_size": None}, ["attention_chunk_size", "null"]),
    "activation": ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'"]),
    "null activation": ({"hidden_act": None}, ["hidden_act"]),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope_scaling.rope_type", "'yarn'"]),
    "new yarn": ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters.rope_type", "'yarn'"]),
    "rope_type list": ({"rope_parameters": {"rope_type": ["llama3"]}}, ["rope_parameters.rope_type"]),
    "rope per layer type": ({"rope_parameters": {"full_attention": {}}}, ["rope_parameters.full_attention"]),
    "rope as a list": ({"rope_scaling": [1]}, ["rope_scaling", "an object"]),
    "llama3 without factor": ({"rope_scaling": {"rope_type": "llama3"}}, ["rope_scaling.factor", "missing"]),
    "llama3 factor 0": ({"rope_scaling": {**LLAMA3, "factor": 0}}, ["rope_scaling.factor"]),
    "llama3 factor NaN": ({"rope_scaling": {**LLAMA3, "factor": math.nan}}, ["rope_scaling.factor"]),
    "llama3 low above high": ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, ["low_freq_factor"]),
    "llama3 original length": ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 0.5}}, ["original_max"]),
    "theta": ({"rope_theta": -1}, ["rope_theta"]),
    "theta string": ({"rope_parameters": {"rope_theta": "big"}}, ["rope_parameters.rope_theta"]),
    "partial rotation": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    "partial rotation, new": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_parameters.partial_rotary"]),
    "moe layer out of range": ({"moe_layers": [0, 48]}, ["moe_layers[1]", "48"]),
    "negative moe layer": ({"moe_layers": [-1]}, ["moe_layers[0]"]),
    "moe layer true": ({"moe_layers": [True]}, ["moe_layers[0]"]),
    "moe layers not a list": ({"moe_layers": 2}, ["moe_layers", "an array"]),
    "NoPE list too short": ({"no_rope_layers": [1, 0]}, ["no_rope_layers", "2 entries for 48"]),
    "NoPE flag 2": ({"no_rope_layers": [2] * 48}, ["no_rope_layers[0]"]),
    "NoPE flag true": ({"no_rope_layers": [True] * 48}, ["no_rope_layers[0]"]),
    "layer types too short": ({"layer_types": ["full_attention"]}, ["layer_types", "1 entries"]),
    "unknown layer type": ({"layer_types": ["sliding_attention"] * 48}, ["layer_types[0]", "'sliding_attention'"]),
    "layer type number": ({"layer_types": [0] * 48}, ["layer_types[0]"]),
    "negative eos": ({"eos_token_id": [1, -1]}, ["eos_token_id[1]"]),
    "eos beyond 32 bits": ({"eos_token_id": 1 << 40}, ["eos_token_id"]),
    "eos string": ({"eos_token_id": "2"}, ["eos_token_id"]),
    "negative bos": ({"bos_token_id": -1}, ["bos_token_id"]),
    "pad fraction": ({"pad_token_id": 0.5}, ["pad_token_id"]),
    "temperature -1": ({"attn_temperature_tuning": -1}, ["attn_temperature_tuning"]),
    "temperature 1.5": ({"attn_temperature_tuning": 1.5}, ["attn_temperature_tuning"]),
    "attn_scale NaN": ({"attn_scale": math.nan}, ["attn_scale"]),
    "other model": ({"model_type": "llama"}, ["model_type", "'llama'"]),
    "no model type": ({"model_type": None}, ["model_type"]),
    "other architecture": ({"architectures": ["LlamaForCausalLM"]}, ["architectures", "'LlamaForCausalLM'"]),
    "architectures as a string": ({"architectures": "Llama4ForCausalLM"}, ["architectures", "an array"]),
    "no text part": ({"model_type": "llama4"}, ["text_config", "missing"]),
    "text part is a list": ({"model_type": "llama4", "text_config": []}, ["text_config", "an object"]),
    "other text part": (
        {"model_type": "llama4", "text_config": {"model_type": "x"}},
        ["text_config.model_type", "'x'"],
    ),
    "text part value": ({"model_type": "llama4", "text_config": {"head_dim": 3}}, ["text_config.head_dim", "3"]),
    "two lines": ({"model_type": "a\nb"}, [r"'a\nb'"]),
    "endless value": ({"model_type": "a" * 1_000_000}, ["aaa...aaa"]),
    "endless list": ({"hidden_act": [[0] * 100_000] * 9}, ["hidden_act"]),
}


@pytest.mark.parametrize(("keys", "mentions"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused(tmp_path: Path, keys: dict[str, Any], mentions: list[str]) -> None:
    assert_refused(lambda: read_text(tmp_path, **keys), ["config.json: ", *mentions])


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b'{"model_type": "llama4_text",}', ["not valid JSON"]),
        (b"[]", ["object was expected", "an array"]),
        (b"null", ["object was expected", "null"]),
        (b'"llama4"', ["object was expected", "a string"]),
        (b"{}", ["model_type is missing"]),
        (b"\xff\xfe{\x00}\x00", ["not UTF-8"]),
        (b'{"a":1,"a":2}', ["'a'", "twice"]),
        (b'{"a":{"b":1,"b":2}}', ["'b'", "twice"]),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, ["nested too deeply"]),
        (b'{"model_type":' + b"[" * 700 + b"]" * 700 + b"}", ["model_type", "[[...]]"]),
        (b'{"a":' + b"1" * 5000 + b"}", ["not valid JSON"]),
        (b" " * (MAX_CONFIG_BYTES + 1), ["10,000,001 bytes"]),
    ],
    ids=range(14),
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, mentions: list[str]) -> None:
    assert_refused(lambda: read(tmp_path, content), ["config.json: ", *mentions])


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """No JSON value under any key gives anything but a config or an InputError."""
    from l4convert.errors import InputError

    text = dict(OLD_SCOUT["text_config"])  # type: ignore[call-overload]
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
    )
    key = data.draw(st.sampled_from([*sorted(text), "rope_parameters", "moe_layers", "layer_types"]))
    if key == "rope_scaling" and data.draw(st.booleans()):
        text[key] = {**LLAMA3, data.draw(st.sampled_from(sorted(LLAMA3))): data.draw(values)}
    else:
        text[key] = data.draw(values)
    assume(key != "model_type")
    try:
        config = read(tmp_path, text)
    except InputError as error:
        assert error.message.isprintable()  # noqa: PT017 - either outcome is right
    else:
        assert config.num_hidden_layers <= 1024


def test_token_ids_beyond_the_vocabulary_are_ids_the_model_cannot_have(tmp_path: Path) -> None:
    """As in a test model cut down from Scout, which keeps Scout's special tokens."""
    ids = {"bos_token_id": 200000, "eos_token_id": [7, 200001, 200007], "pad_token_id": 200018}
    config = read(tmp_path, {"model_type": "llama4_text", "vocab_size": 1000, **ids})
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (7,), None)
