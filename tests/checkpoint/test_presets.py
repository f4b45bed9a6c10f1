"""Published models: their sizes are those announced, and their configs those of the published checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from l4convert.checkpoint.parameters import parameter_counts
from l4convert.checkpoint.presets import PRESETS, planned_tensors, preset_checkpoint
from l4convert.errors import UsageError

# Billions of parameters, of the text decoder. Meta announces 109 (with vision), 400 and "nearly two trillion" in all,
# 17, 17 and 288 active. Behemoth's dimensions are assumptions, so its margin is wider.
ANNOUNCED = {"scout": (108, 17, 0.01), "maverick": (400, 17, 0.01), "behemoth": (2000, 288, 0.02)}


def test_every_preset_has_an_announced_size():
    assert PRESETS.keys() == ANNOUNCED.keys()


@pytest.mark.parametrize("name", ANNOUNCED)
def test_sizes_are_those_announced(name):
    total, active, margin = ANNOUNCED[name]
    checkpoint = preset_checkpoint(name)
    counted = parameter_counts(checkpoint.config, checkpoint.tensors)
    assert counted[0] / 1e9 == pytest.approx(total, rel=margin)
    assert counted[1] / 1e9 == pytest.approx(active, rel=max(margin, 0.02))


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_transformers(name):
    """The config as transformers would read it gives a model of the same tensors (on the meta device)."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = PRESETS[name]
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "num_hidden_layers",
        "tie_word_embeddings", "attention_bias",
    )  # fmt: skip
    given = {field: getattr(config, field) for field in fields}
    moe = [index for index, layer in enumerate(config.layers) if layer.moe]
    theirs = Llama4TextConfig(**given, moe_layers=moe)
    with torch.device("meta"):
        state = Llama4ForCausalLM(theirs).state_dict()
    ours = {name: tensor.dims for name, tensor in planned_tensors(config, "stacked").items()}
    assert ours == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_reading_a_weight_is_a_defect():
    tensor = preset_checkpoint("scout").tensors["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight was read"):
        np.asarray(tensor)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="no preset 'scuot'") as error:
        preset_checkpoint("scuot")
    assert error.value.hint == "presets: scout, maverick, behemoth"
