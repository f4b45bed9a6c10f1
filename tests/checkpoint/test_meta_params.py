"""params.json: widths and kinds of layers equal those of the modules that Meta's code makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_models.llama4.args import ModelArgs
from llama_models.llama4.ffn import FeedForward
from llama_models.llama4.model import TransformerBlock

from l4convert.checkpoint.config import DecoderConfig, LayerConfig
from l4convert.checkpoint.meta_params import read_params
from l4convert.checkpoint.presets import PRESETS
from l4convert.parity.meta_reference import gloo
from tests.checkpoint.refusals import assert_refused
from tests.meta_checkpoints import MAVERICK, SCOUT

# As published (the widths are the models' own), but for the image encoder.
PUBLISHED_SCOUT: Mapping[str, Any] = {
    "dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202048, "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.2, "multiple_of": 2048, "norm_eps": 1e-5, "attention_chunk_size": 8192,
    "rope_theta": 500000.0, "use_scaled_rope": True, "nope_layer_interval": 4, "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 16, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1},
}  # fmt: skip
PUBLISHED_MAVERICK: Mapping[str, Any] = {
    **PUBLISHED_SCOUT,
    "use_scaled_rope": False,
    "use_qk_norm": False,
    "moe_args": {**PUBLISHED_SCOUT["moe_args"], "num_experts": 128, "interleave_moe_layer_step": 2},
}


def read(folder: Path, params: Mapping[str, Any], rows: int = 2344) -> DecoderConfig:
    (folder / "params.json").write_text(json.dumps(params))
    return read_params(folder / "params.json", rows)


@pytest.mark.parametrize(("params", "preset"), [(PUBLISHED_SCOUT, "scout"), (PUBLISHED_MAVERICK, "maverick")])
def test_published_sizes_are_those_of_the_hugging_face_configs(
    tmp_path: Path, params: Mapping[str, Any], preset: str
) -> None:
    assert read(tmp_path, params, 202048) == PRESETS[preset]


PARAMS = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 6),
        "ffn_exp": st.sampled_from([1.0, 1.5, 2.7, 4.0]),
        "ffn_dim_multiplier": st.sampled_from([0.7, 1.0, 1.2, 1.3]),
        "multiple_of": st.sampled_from([1, 8, 32, 96]),
        "nope_layer_interval": st.sampled_from([None, 1, 2, 4]),
        "attention_chunk_size": st.sampled_from([None, 0, 8]),
        "moe_args": st.none()
        | st.fixed_dictionaries(
            {"num_experts": st.integers(1, 3)},
            optional={
                "auto_scale_F": st.booleans(),
                "capacity_factor": st.sampled_from([0.5, 1.0, 2.0]),
                "interleave_moe_layer_step": st.integers(1, 3),
            },
        ),
    },
    optional={"use_qk_norm": st.booleans(), "attn_temperature_tuning": st.booleans()},
)


@given(PARAMS)
@settings(max_examples=30)
def test_layers_equal_the_modules_that_metas_code_makes(tmp_path_factory: Any, drawn: dict[str, Any]) -> None:
    params = {"dim": 48, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, **drawn}
    config = read(tmp_path_factory.mktemp("params"), params)
    with gloo(), torch.device("meta"):
        blocks = [
            TransformerBlock(i, ModelArgs(**params, max_batch_size=1, max_seq_len=1))
            for i in range(config.num_hidden_layers)
        ]
    for block, layer in zip(blocks, config.layers, strict=True):
        dense = isinstance(block.feed_forward, FeedForward)
        chunked = not block.is_nope_layer and bool(params["attention_chunk_size"])
        assert layer == LayerConfig(not block.is_nope_layer, chunked, not dense)
        assert block.attention.use_qk_norm == (config.use_qk_norm and layer.rope)
        assert block.attention.attn_temperature_tuning == config.attn_temperature_tuning
        if dense:
            assert block.feed_forward.w1.weight.shape == (config.intermediate_size_mlp, 48)
        else:
            assert block.feed_forward.experts.w1.shape == (config.num_local_experts, 48, config.intermediate_size)
            assert block.feed_forward.shared_expert.w1.weight.shape == (config.intermediate_size, 48)


def test_defaults_are_those_of_metas_arguments(tmp_path: Path) -> None:
    least = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2}
    config, args = read(tmp_path, least), ModelArgs(**least)
    assert config.vocab_size == 2344
    assert config.rms_norm_eps == args.norm_eps
    assert config.rope_theta == args.rope_theta
    assert (config.floor_scale, config.attn_scale) == (args.floor_scale, args.attn_scale)
    assert (config.use_qk_norm, config.attn_temperature_tuning) == (args.use_qk_norm, args.attn_temperature_tuning)
    assert config.rope_scaling is None
    assert not args.use_scaled_rope


def test_scaled_rope_has_the_factors_that_metas_arguments_put_in(tmp_path: Path) -> None:
    args = ModelArgs(dim=64, n_heads=4, n_kv_heads=4, use_scaled_rope=True)
    scaling = read(tmp_path, SCOUT).rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.high_freq_factor) == (args.rope_scaling_factor, args.rope_high_freq_factor)
    given_factors = read(tmp_path, {**SCOUT, "rope_scaling_factor": 8, "rope_high_freq_factor": 4}).rope_scaling
    assert given_factors is not None
    assert (given_factors.factor, given_factors.high_freq_factor) == (8, 4)


def test_params_may_lie_one_level_deeper(tmp_path: Path) -> None:
    assert read(tmp_path, {"model": dict(SCOUT)}) == read(tmp_path, SCOUT)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no dim": ({"dim": None}, ["dim"]),
    "text": ({"dim": "64"}, ["dim", "string"]),
    "negative": ({"n_layers": -1}, ["n_layers"]),
    "a billion layers": ({"n_layers": 10**9}, ["n_layers"]),
    "a billion experts": ({"moe_args": {"num_experts": 10**9}}, ["num_experts"]),
    "many experts in many layers": ({"n_layers": 1000, "moe_args": {"num_experts": 4096}}, ["num_experts"]),
    "no number of experts": ({"moe_args": {}}, ["num_experts"]),
    "experts of a list": ({"moe_args": []}, ["moe_args"]),
    "more chosen than there are": ({"moe_args": {"num_experts": 2, "top_k": 3}}, ["top_k"]),
    "heads that do not divide": ({"n_heads": 24}, ["dim"]),
    "odd heads": ({"dim": 72, "n_heads": 8}, ["dim"]),
    "key heads that do not divide": ({"n_kv_heads": 3}, ["n_heads"]),
    "another head_dim": ({"head_dim": 16}, ["head_dim", "dim / n_heads"]),
    "nan": ({"norm_eps": float("nan")}, ["norm_eps"]),
    "infinite": ({"ffn_exp": float("inf")}, ["ffn_exp"]),
    "huge": ({"ffn_dim_multiplier": 1e299}, ["ffn_dim_multiplier"]),
    "no expansion": ({"ffn_exp": None}, ["ffn_exp"]),
    "no multiplier": ({"ffn_dim_multiplier": None}, ["ffn_dim_multiplier"]),
    "a huge multiple": ({"multiple_of": 2**31}, ["multiple_of"]),
    "capacity below zero": ({"moe_args": {"num_experts": 2, "capacity_factor": -3.0}}, ["capacity_factor"]),
    "capacity that divides by zero": ({"moe_args": {"num_experts": 2, "capacity_factor": -1.0}}, ["capacity_factor"]),
    "quantized otherwise": ({"quantization_args": {"scheme": "int4"}}, ["quantization_args"]),
    "adapters": ({"lora_args": {"rank": 1}}, ["lora_args"]),
    "scaling below one": ({"rope_high_freq_factor": 0.5}, ["rope_high_freq_factor"]),
    "vocabulary of none": ({"vocab_size": 0}, ["vocab_size"]),
    "a chunk below zero": ({"attention_chunk_size": -8}, ["attention_chunk_size"]),
    "no interval": ({"nope_layer_interval": 0}, ["nope_layer_interval"]),
    "flags that are numbers": ({"use_qk_norm": 1}, ["use_qk_norm"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_values_out_of_range_are_refused_by_their_key(tmp_path: Path, kind: str) -> None:
    change, mentions = BAD[kind]
    assert_refused(lambda: read(tmp_path, {**MAVERICK, "use_scaled_rope": True, **change}), ["params.json", *mentions])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 10**5, b'{"dim": 1, "dim": 2}'])
def test_files_that_are_no_object_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.json").write_bytes(content)
    assert_refused(lambda: read_params(tmp_path / "params.json", 1), ["params.json"])
