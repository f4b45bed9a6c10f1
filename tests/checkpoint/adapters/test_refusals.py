"""Adapters that are damaged, of another kind or for another model: each is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.adapters import merge_adapters, open_adapter
from l4convert.errors import InputError
from tests.adapters import PARAMETERS, edit_config, edit_weights, write_adapter
from tests.checkpoint.refusals import assert_refused

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
EXPERTS = "base_model.model.model.layers.1.feed_forward.experts"
Change = Callable[[Path], object]


def config(**fields: Any) -> Change:
    return lambda path: edit_config(path, **fields)


def text(old: str, new: str) -> Change:
    def change(path: Path) -> None:
        content = (path / CONFIG).read_text()
        assert old in content
        (path / CONFIG).write_text(content.replace(old, new))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda path: edit_weights(path, change)


def put(name: str, tensor: torch.Tensor) -> Change:
    return tensors(lambda t: t.update({name: tensor}))


def move(old: str, new: str) -> Change:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def spoil(name: str, value: float) -> Change:
    return tensors(lambda t: t[name].view(-1)[:3].fill_(value))


def relink(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to("nowhere")


ZEROS = torch.zeros
HEAD = ZEROS(128, 64)
REFUSED: dict[str, tuple[Change, list[str]]] = {
    "no config": (lambda p: (p / CONFIG).unlink(), ["no adapter_config.json"]),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), [WEIGHTS, "no such file"]),
    "a link to nowhere": (relink, [WEIGHTS, "link to a file that does not exist"]),
    "a pickle": (lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"), ["adapter_model.bin", "pickle"]),
    "not JSON": (lambda p: (p / CONFIG).write_text("{"), [CONFIG, "not valid JSON"]),
    "a key twice": (text('"r": 4', '"r": 4, "r": 8'), [CONFIG, "'r' occurs twice"]),
    "cut weights": (lambda p: os.truncate(p / WEIGHTS, 3000), [WEIGHTS, "truncated"]),
    "no tensors": (tensors(lambda t: t.clear()), [WEIGHTS, "no tensor in it"]),
    "another method": (config(peft_type="LOHA"), [CONFIG, "peft_type", "'LOHA'"]),
    "no method": (config(peft_type=None), [CONFIG, "peft_type"]),
    "r is 0": (config(r=0), [CONFIG, "r is 0"]),
    "r is negative": (config(r=-1), [CONFIG, "r is -1"]),
    "r is huge": (config(r=10**9), [CONFIG, "r is 1000000000"]),
    "r is a fraction": (config(r=4.0), [CONFIG, "r must be an integer"]),
    "alpha is NaN": (config(lora_alpha=float("nan")), [CONFIG, "lora_alpha is nan"]),
    "alpha is infinite": (config(lora_alpha=float("inf")), [CONFIG, "lora_alpha is inf"]),
    "alpha is negative": (config(lora_alpha=-2), [CONFIG, "lora_alpha is -2"]),
    "alpha is huge": (config(lora_alpha=1e9), [CONFIG, "lora_alpha is 1e+09"]),
    "alpha is text": (config(lora_alpha="16"), [CONFIG, "lora_alpha must be a number"]),
    "rank pattern is a list": (config(rank_pattern=[4]), [CONFIG, "rank_pattern must be an object"]),
    "rank of a pattern is 0": (config(rank_pattern={"q_proj": 0}), [CONFIG, "rank_pattern.q_proj is 0"]),
    "alpha of a pattern is NaN": (config(alpha_pattern={"q": float("nan")}), [CONFIG, "alpha_pattern.q is nan"]),
    "no expression": (config(alpha_pattern={"q(": 4}), ["alpha_pattern", "not a regular expression"]),
    "a backreference": (config(alpha_pattern={"(q)\\2": 4}), ["alpha_pattern", "not a regular expression"]),
    "targets are a number": (config(target_modules=4), [CONFIG, "target_modules must be an array"]),
    "a target is a number": (config(target_modules=["q_proj", 4]), [CONFIG, "target_modules[1]"]),
    "DoRA": (config(use_dora=True), [CONFIG, "use_dora", "DoRA"]),
    "DoRA in the weights": (put(f"{MODULE}.lora_magnitude_vector", ZEROS(64)), ["lora_magnitude_vector", "DoRA"]),
    "biases": (config(bias="all"), [CONFIG, "bias is 'all'"]),
    "bias of lora_B": (config(lora_bias=True), [CONFIG, "lora_bias"]),
    "bias in the weights": (put(f"{MODULE}.lora_B.bias", ZEROS(64)), ["lora_B.bias"]),
    "replicated layers": (config(layer_replication=[[0, 2], [1, 4]]), [CONFIG, "layer_replication"]),
    "PiSSA": (config(init_lora_weights="pissa_niter_4"), [CONFIG, "pissa_niter_4", "changes the base"]),
    "single tokens": (config(trainable_token_indices=[1]), [CONFIG, "trainable_token_indices"]),
    "a setting of the future": (config(use_magic=True), [CONFIG, "use_magic", "not known"]),
    "lora_A alone": (tensors(lambda t: t.pop(B)), [WEIGHTS, B, "missing"]),
    "lora_B alone": (tensors(lambda t: t.pop(A)), [WEIGHTS, A, "missing"]),
    "a layer left out": (tensors(lambda t: (t.pop(A), t.pop(B))), [WEIGHTS, A, "missing", "target_modules"]),
    "rank other than r": (config(r=8), [A, "[4, 64]", "[8, 64]", CONFIG]),
    "rank of B": (put(B, ZEROS(64, 5)), [B, "[64, 5]", "[64, 4]"]),
    "another width": (put(A, ZEROS(4, 5120)), [A, "[4, 5120]", "trained on", "tests/base"]),
    "a vector": (put(A, ZEROS(256)), [A, "[256]"]),
    "a scalar": (put(A, torch.tensor(1.0)), [A, "[]"]),
    "integers": (put(A, ZEROS(4, 64, dtype=torch.int8)), [A, "I8", "BF16"]),
    "double": (put(A, ZEROS(4, 64, dtype=torch.float64)), [A, "F64"]),
    "no prefix": (move(A, A.removeprefix("base_model.model.")), ["model.layers.0", "is not named as peft"]),
    "another layer": (
        tensors(lambda t: t.update({n.replace("layers.0", "layers.99"): t.pop(n) for n in (A, B)})),
        ["layers.99", "does not adapt"],
    ),
    "another module": (
        tensors(lambda t: t.update({n.replace("q_proj", "qkv"): t.pop(n) for n in (A, B)})),
        ["self_attn.qkv", "does not adapt"],
    ),
    "a norm": (
        tensors(lambda t: t.update({n.replace("self_attn.q_proj", "input_layernorm"): t.pop(n) for n in (A, B)})),
        ["input_layernorm", "does not adapt"],
    ),
    "control characters": (
        tensors(lambda t: t.update({n.replace("q_proj", "\x1b[2J\n"): t.pop(n) for n in (A, B)})),
        ["does not adapt"],
    ),
    "an unknown part": (put(f"{MODULE}.lora_C.weight", ZEROS(4, 4)), ["lora_C", "no kind of LoRA"]),
    "an embedding of a linear layer": (
        tensors(lambda t: t.update({f"{MODULE}.lora_embedding_{n[len(MODULE) + 6]}": t.pop(n) for n in (A, B)})),
        ["lora_embedding", "of an embedding"],
    ),
    "a whole weight not listed": (put(f"{MODULE}.weight", ZEROS(64, 64)), ["q_proj.weight", "modules_to_save"]),
    "embeddings of another size": (
        put("base_model.model.model.embed_tokens.weight", ZEROS(130, 64)),
        ["embed_tokens.weight", "[130, 64]", "vocabulary"],
    ),
    "a weight twice": (
        tensors(lambda t: t.update({f"base_model.model.lm_head{x}.weight": HEAD.clone() for x in ("", ".base_layer")})),
        ["lm_head", "twice"],
    ),
    "only the vision part": (
        tensors(lambda t: t.update({n.replace("model.layers", "vision_model.x"): t.pop(n) for n in list(t)})),
        ["all 8 tensors are of the vision part"],
    ),
    "NaN in lora_A": (spoil(A, float("nan")), [WEIGHTS, A, "3 NaN or infinite"]),
    "infinite in lora_B": (spoil(B, float("inf")), [WEIGHTS, B, "3 NaN or infinite"]),
    "experts that are not listed": (
        lambda p: (
            put(f"{EXPERTS}.lora_A.weight", ZEROS(16, 64))(p),
            put(f"{EXPERTS}.lora_B.weight", ZEROS(64, 16))(p),
        ),
        ["feed_forward.experts", "target_parameters"],
    ),
    "experts of another number": (
        lambda p: (
            config(target_parameters=PARAMETERS[1:])(p),
            put(f"{EXPERTS}.lora_A.weight", ZEROS(8, 64))(p),
            put(f"{EXPERTS}.lora_B.weight", ZEROS(64, 8))(p),
        ),
        [f"{EXPERTS}.lora_A.weight", "[8, 64]", "[16, 64]"],
    ),
    "experts nested too deep": (
        lambda p: (
            config(target_parameters=PARAMETERS[1:])(p),
            put(f"{EXPERTS}.base_layer.lora_A.weight", ZEROS(16, 64))(p),
            put(f"{EXPERTS}.base_layer.lora_B.weight", ZEROS(64, 16))(p),
        ),
        ["feed_forward.experts", "target_parameters"],
    ),
    "fan in, fan out": (config(fan_in_fan_out=True, target_parameters=PARAMETERS), [CONFIG, "fan_in_fan_out"]),
}


@pytest.fixture(scope="module")
def adapter(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the queries of all four layers."""
    path = write_adapter(scout_layout, tmp_path_factory.mktemp("adapter") / "a", target_modules=["q_proj"])
    edit_config(path, base_model_name_or_path="tests/base")
    return path


def use(base: Path, path: Path) -> None:
    """Merge, and read what was merged."""
    for tensor in merge_adapters(open_checkpoint(base), [path]).tensors.values():
        tensor.numpy()


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_merged_is_refused(
    scout_layout: Path, adapter: Path, tmp_path: Path, kind: str
) -> None:
    change, mentions = REFUSED[kind]
    path = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change(path)
    assert_refused(lambda: use(scout_layout, path), ["adapter", *mentions])


def test_what_is_no_adapter(scout_layout: Path, adapter: Path, tmp_path: Path) -> None:
    assert_refused(lambda: open_adapter(tmp_path / "absent"), ["absent", "no such folder"])
    assert_refused(lambda: open_adapter(adapter / CONFIG), [CONFIG, "not a folder"])
    assert_refused(lambda: open_adapter(scout_layout), ["no adapter_config.json", "checkpoint"])
    shutil.copytree(adapter, tmp_path / "checkpoint-500")
    assert_refused(lambda: open_adapter(tmp_path), ["no adapter_config.json", "checkpoint-500"])


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("lm_head", {"target_modules": ["lm_head"]}),
        ("embed_tokens", {"target_modules": ["embed_tokens"]}),
        ("embed_tokens", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_tied_weights_are_not_adapted_in_one_place(module: str, options: dict[str, Any], tmp_path: Path) -> None:
    from tests.checkpoints import write_random_checkpoint

    base = write_random_checkpoint(tmp_path / "base", tie_word_embeddings=True, num_hidden_layers=1)
    path = write_adapter(base, tmp_path / "a", **options)
    assert_refused(lambda: use(base, path), [WEIGHTS, module, "shares"])


@pytest.mark.parametrize("patterns", [["(((a|[^q])+)+)+!"], [f"((.*)*)*{i}!" for i in range(2000)], ["(" * 200]])
def test_hostile_expressions_cost_no_time(
    scout_layout: Path, adapter: Path, tmp_path: Path, patterns: list[str]
) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    edit_config(path, rank_pattern=dict.fromkeys(patterns, 8))
    begin = time.process_time()
    with contextlib.suppress(InputError):  # refused, or found not to match
        merge_adapters(open_checkpoint(scout_layout), [path])
    assert time.process_time() - begin < 4


def test_settings_that_change_nothing_are_no_reason_to_refuse(
    scout_layout: Path, adapter: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    content = json.loads((path / CONFIG).read_text())
    for key in ("use_dora", "lora_bias", "alpha_pattern", "auto_mapping", "peft_version", "qalora_group_size"):
        content.pop(key)  # as earlier versions wrote it
    content |= {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "later": None}
    (path / CONFIG).write_text(json.dumps(content))
    use(scout_layout, path)
