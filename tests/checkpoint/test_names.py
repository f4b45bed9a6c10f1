from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.config import DecoderConfig, LayerConfig
from l4convert.checkpoint.hf_config import read_config
from l4convert.checkpoint.names import LAYOUTS, Layout, expected_tensors, find_experts, find_layout
from tests.checkpoints import unfuse
from tests.shapes import SCOUT

BASE = dataclasses.replace(
    SCOUT,
    vocab_size=64,
    hidden_size=24,
    intermediate_size=12,
    intermediate_size_mlp=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=3,
    layers=(),
)
CONFIGS = st.builds(
    lambda layers, bias, tied, experts: dataclasses.replace(
        BASE,
        layers=tuple(LayerConfig(True, True, moe) for moe in layers),
        attention_bias=bias,
        tie_word_embeddings=tied,
        num_local_experts=experts,
    ),
    st.lists(st.booleans(), max_size=14),
    st.booleans(),
    st.booleans(),
    st.integers(1, 12),
)


@given(config=CONFIGS, experts=st.sampled_from(["stacked", "unfused"]), layout=st.sampled_from(LAYOUTS))
def test_names_map_one_to_one(config: DecoderConfig, experts: str, layout: Layout) -> None:
    canonical = list(expected_tensors(config, experts))  # type: ignore[arg-type]
    stored = [layout.stored(name) for name in canonical]
    assert len(set(stored)) == len(stored)
    assert [layout.canonical(name) for name in stored] == canonical
    assert find_layout(stored) is layout
    assert find_experts(stored) == (experts if any(layer.moe for layer in config.layers) else "stacked")


@given(name=st.text(alphabet="model.language_head", max_size=60), layout=st.sampled_from(LAYOUTS))
def test_no_two_stored_names_mean_the_same(name: str, layout: Layout) -> None:
    canonical = layout.canonical(name)
    assert canonical is None or layout.stored(canonical) == name


@pytest.mark.parametrize("overrides", [{}, {"attention_bias": True, "interleave_moe_layer_step": 2}])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("unfused", [False, True])
def test_names_and_shapes_are_those_of_transformers(
    tmp_path: Path, overrides: dict[str, object], tied: bool, unfused: bool
) -> None:
    import json

    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from tests.checkpoints import SMALL

    config = Llama4TextConfig(**{**SMALL, **overrides, "tie_word_embeddings": tied})
    with torch.device("meta"):
        state = Llama4ForCausalLM(config).state_dict()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    if tied:
        del state["lm_head.weight"]
    if unfused:
        state = unfuse(state)
    ours = expected_tensors(read_config(tmp_path / "config.json"), "unfused" if unfused else "stacked")
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items()}
