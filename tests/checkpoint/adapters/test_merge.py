"""Merged weights against those that the peft library merges into transformers' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.adapters import merge_adapters
from l4convert.checkpoint.safetensors_file import Stored
from tests.adapters import PARAMETERS, as_torch, edit_config, edit_weights, merged_by_peft, randomize, write_adapter
from tests.checkpoints import MAVERICK, unfuse, write_random_checkpoint

# What is adapted; widths all differ, so that no factor fits where it does not belong.
ODD = {**MAVERICK, "num_local_experts": 3, "intermediate_size": 48, "num_hidden_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "v_proj", "shared_expert.down_proj"], "use_rslora": True, "r": 5},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 8, r"layers\.[01]\..*v_proj": 2},
        "alpha_pattern": {"gate_proj": 1, "^model.layers.0.self_attn.q_proj": 3},
    },
    "router": {"target_modules": ["router"]},
    "some layers": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "experts": {"target_modules": ["k_proj"], "target_parameters": PARAMETERS, "rank_pattern": {"down_proj": 2}},
    "one expert tensor": {"target_modules": [], "target_parameters": PARAMETERS[1:]},
    "parameters": {
        "target_modules": [],
        "target_parameters": ["self_attn.q_proj.weight", "embed_tokens.weight"],
        "alpha_pattern": {"q_proj.weight": 1},
    },
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "router", "experts"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("base"), **ODD)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("unfused"), unfused=True, **ODD)


def merged(base: Path, *adapters: Path) -> Checkpoint:
    return merge_adapters(open_checkpoint(base), adapters)


def changed(base: Path, ours: dict[str, torch.Tensor]) -> set[str]:
    before = as_torch(open_checkpoint(base).tensors)
    return {name for name, tensor in ours.items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_weight_is_what_peft_merges_rounded_once(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    checkpoint = merged(base, adapter)
    ours, theirs = as_torch(checkpoint.tensors), merged_by_peft(base, adapter, dtype="float64")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].float().bfloat16().float()), name
    applied = checkpoint.adapters[0]
    assert {*applied.merged, *applied.replaced} == changed(base, ours) != set()
    # Their bytes are in no file of the checkpoint, which an artifact could share.
    assert not any(isinstance(checkpoint.tensors[name], Stored) for name in changed(base, ours))


@pytest.mark.parametrize("kind", ["linear", "embeddings", "experts"])
def test_peft_in_the_checkpoints_type_is_within_one_rounding(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    checkpoint = merged(base, adapter)
    ours, theirs = as_torch(checkpoint.tensors), merged_by_peft(base, adapter, dtype="bfloat16")
    for name in checkpoint.adapters[0].merged:
        torch.testing.assert_close(ours[name], theirs[name].float(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_of_checkpoint_and_of_adapter(tmp_path: Path, dtype: str) -> None:
    base = write_random_checkpoint(tmp_path / "base", dtype=dtype, **{**ODD, "num_hidden_layers": 1})
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    edit_weights(adapter, lambda t: t.update({n: x.half() if "q_proj" in n else x.bfloat16() for n, x in t.items()}))
    ours, theirs = as_torch(merged(base, adapter).tensors), merged_by_peft(base, adapter, dtype="float64")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].float().to(getattr(torch, dtype)).float()), name


def test_adapters_add_up_in_their_order_and_are_rounded_once(base: Path, tmp_path: Path) -> None:
    first = write_adapter(base, tmp_path / "1", target_modules=["q_proj", "o_proj"])
    saved = write_adapter(base, tmp_path / "2", target_modules=["v_proj"], modules_to_save=["q_proj"], seed=1)
    last = write_adapter(base, tmp_path / "3", target_modules=["q_proj", "o_proj"], seed=2)
    checkpoint = merged(base, first, saved, last)
    theirs = merged_by_peft(base, first, saved, last, dtype="float64")
    for name, tensor in as_torch(checkpoint.tensors).items():
        assert torch.equal(tensor, theirs[name].float().bfloat16().float()), name
    assert [adapter.path for adapter in checkpoint.adapters] == [first, saved, last]
    again = as_torch(merged(base, last, saved, first).tensors)
    assert not torch.equal(
        again["model.layers.0.self_attn.q_proj.weight"],
        as_torch(checkpoint.tensors)["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize("kind", ["linear", "experts", "one expert tensor"])
def test_experts_one_by_one_get_what_stacked_ones_get(base: Path, unfused: Path, tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(base, tmp_path / "adapter", **CONFIGS[kind])
    stacked, single = as_torch(merged(base, adapter).tensors), as_torch(merged(unfused, adapter).tensors)
    split = unfuse(stacked)
    assert split.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(tensor, split[name]), name


def test_an_adapter_of_single_experts(base: Path, unfused: Path, tmp_path: Path) -> None:
    """Of a model with linear experts, as some trainers make it; peft merges the layers by themselves here."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    weights = {name: tensor for name, tensor in load_file(unfused / "model.safetensors").items() if ".experts." in name}
    model = torch.nn.Module()
    for name, weight in weights.items():
        *parents, leaf, _ = name.split(".")
        module = model
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.double()
        module.add_module(leaf, linear)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=r".*experts\.[02]\.(gate|up|down)_proj")
    adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    randomize(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = {n: t.float().bfloat16().float() for n, t in adapted.double().merge_and_unload().state_dict().items()}
    single, stacked = (as_torch(merged(path, tmp_path / "adapter").tensors) for path in (unfused, base))
    split = unfuse(stacked)
    for name, tensor in theirs.items():
        assert torch.equal(single[name], tensor), name
        assert torch.equal(split[name], tensor), name
    assert len(changed(unfused, single)) == 2 * 3


def test_expert_factors_as_peft_wrote_them_before_0_19(base: Path, tmp_path: Path) -> None:
    """peft takes them still for modules that say ``is_transposed``; shapes tell them apart."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Llama4ForCausalLM

    def model() -> Any:
        loaded: Any = Llama4ForCausalLM.from_pretrained(base, dtype=torch.float32)
        for layer in loaded.model.layers[1::2]:
            layer.feed_forward.experts.is_transposed = True
        return loaded

    adapted: Any = get_peft_model(model(), LoraConfig(r=4, target_modules=[], target_parameters=PARAMETERS))
    randomize(adapted)
    adapted.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(model(), tmp_path).double().merge_and_unload().state_dict()
    for name, tensor in as_torch(merged(base, tmp_path).tensors).items():
        assert torch.equal(tensor, theirs[name].float().bfloat16().float()), name


def test_square_experts_go_by_the_version(scout_layout: Path, tmp_path: Path) -> None:
    """Where in and out are as wide, shapes say nothing of the order of the factors."""
    adapter = write_adapter(scout_layout, tmp_path, target_modules=[], target_parameters=PARAMETERS[1:])
    name = f"model.layers.0.{PARAMETERS[1]}"
    theirs = merged_by_peft(scout_layout, adapter, dtype="float64")[name].float().bfloat16().float()
    assert torch.equal(as_torch(merged(scout_layout, adapter).tensors)[name], theirs)
    edit_config(adapter, peft_version="0.18.1")
    before = as_torch(open_checkpoint(scout_layout).tensors)[name]
    old = as_torch(merged(scout_layout, adapter).tensors)[name]
    torch.testing.assert_close(old - before, (theirs - before).transpose(1, 2), rtol=0, atol=2**-7)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_of_the_multimodal_model(base: Path, tmp_path: Path, prefix: str) -> None:
    adapter = write_adapter(base, tmp_path, alpha_pattern={"^model.layers.1": 1}, **CONFIGS["embeddings"])
    plain = as_torch(merged(base, adapter).tensors)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            head = "base_model.model." + ("language_model." if prefix.endswith("model.model.") else "")
            old = name.removeprefix("base_model.model.")
            new = head + old if old.startswith("lm_head") else "base_model.model." + prefix + old.removeprefix("model.")
            tensors[new] = tensors.pop(name)
        tensors["base_model.model.vision_model.layers.0.q_proj.lora_A.weight"] = torch.ones(4, 8)

    edit_weights(adapter, rename)
    checkpoint = merged(base, adapter)
    for name, tensor in as_torch(checkpoint.tensors).items():
        assert torch.equal(tensor, plain[name]), name
    assert checkpoint.adapters[0].vision == 1
    assert checkpoint.adapters[0].words == ("merged into 2 tensors (rank 4, scale 1.5); 1 of the vision part left out")
