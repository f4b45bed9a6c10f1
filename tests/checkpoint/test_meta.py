"""Folders of Meta's: whatever their spelling and number of files, the weights are those of Meta's modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.pipeline import ConvertOptions, convert
from tests.checkpoint.refusals import assert_refused
from tests.checkpoints import save_sharded
from tests.meta_checkpoints import (
    EXPERTS,
    MAVERICK,
    RESERVED,
    SCOUT,
    SHARED,
    VISION,
    published,
    random_state,
    write_meta,
    write_ranks,
)


@pytest.fixture(scope="module")
def states() -> dict[str, Any]:
    return {"scout": random_state(SCOUT), "maverick": random_state(MAVERICK)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, states: dict[str, Any]) -> Path:
    """Maverick's layers in two files, to be copied and damaged."""
    return write_meta(tmp_path_factory.mktemp("meta") / "ckpt", MAVERICK, published(states["maverick"]), 2)


def canonical(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of Meta's modules under transformers' names: only names, transposes and joins."""
    out = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["output.weight"],
    }
    swiglu = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for layer in range(4):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        out[f"{ours}input_layernorm.weight"] = state[f"{theirs}attention_norm.weight"]
        out[f"{ours}post_attention_layernorm.weight"] = state[f"{theirs}ffn_norm.weight"]
        for name in "qkvo":
            out[f"{ours}self_attn.{name}_proj.weight"] = state[f"{theirs}attention.w{name}.weight"]
        moe = f"{theirs}feed_forward.router_DE" in state
        dense = "feed_forward.shared_expert." if moe else "feed_forward."
        for name, short in swiglu.items():
            out[f"{ours}{dense}{name}.weight"] = state[f"{theirs}{dense}{short}.weight"]
        if moe:
            experts = f"{theirs}feed_forward.experts."
            out[f"{ours}feed_forward.router.weight"] = state[f"{theirs}feed_forward.router_DE"].T
            both = [state[f"{experts}w1"], state[f"{experts}w3"]]
            out[f"{ours}feed_forward.experts.gate_up_proj"] = torch.cat(both, -1)
            out[f"{ours}feed_forward.experts.down_proj"] = state[f"{experts}w2"]
    return out


def assert_equal(checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    expected = canonical(state)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in checkpoint.tensors.items():
        value = expected[name].contiguous()
        assert tensor.dims == tuple(value.shape), name
        assert tensor.tobytes() == value.view(torch.uint8).numpy().tobytes(), name


SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "scout": ("scout", {}),
    "scout in three axes": ("scout", {"flat": False}),
    "maverick": ("maverick", {}),
    "maverick fused": ("maverick", {"dense": "fc", "norms": "mlp"}),
}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_and_number_of_files_gives_the_modules_weights(
    tmp_path: Path, states: dict[str, Any], spelling: str, shards: int
) -> None:
    kind, options = SPELLINGS[spelling]
    params = {"scout": SCOUT, "maverick": MAVERICK}[kind]
    path = write_meta(tmp_path / "ckpt", params, published(states[kind], **options), shards)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.format, checkpoint.experts) == ("meta", "stacked")
    assert_equal(checkpoint, states[kind])


def test_the_modules_own_names_are_read_too(tmp_path: Path, states: dict[str, Any]) -> None:
    assert_equal(open_checkpoint(write_meta(tmp_path / "ckpt", MAVERICK, states["maverick"])), states["maverick"])


def test_one_file_may_be_called_consolidated_pth(tmp_path: Path, states: dict[str, Any]) -> None:
    path = write_meta(tmp_path / "ckpt", SCOUT, states["scout"])
    (path / "consolidated.00.pth").rename(path / "consolidated.pth")
    assert_equal(open_checkpoint(path), states["scout"])


def test_tiles_that_cross_the_borders_of_files_are_right(folder: Path, states: dict[str, Any]) -> None:
    expected = canonical(states["maverick"])
    for name, tensor in open_checkpoint(folder).tensors.items():
        if len(tensor.dims) < 2:
            continue
        batch, rows, cols = tensor.matrix
        some = (batch - 1, slice(rows // 3, rows - 1), slice(cols // 3, cols - 1))
        whole = expected[name].float().reshape(tensor.matrix).numpy()
        np.testing.assert_array_equal(tensor.tile(*some).astype(np.float32), whole[some], err_msg=name)


def test_the_image_encoder_is_left_out(tmp_path: Path) -> None:
    params = {**SCOUT, "vision_args": dict(VISION), "n_layers": 1}
    state = random_state(params)
    vision = [name for name in state if name.startswith("vision_")]
    assert len(vision) > 10
    whole = open_checkpoint(write_meta(tmp_path / "whole", params, published(state), 2))
    text = {name: value for name, value in state.items() if name not in vision}
    alone = open_checkpoint(write_meta(tmp_path / "alone", params, published(text), 2))
    assert {n: t.tobytes() for n, t in whole.tensors.items()} == {n: t.tobytes() for n, t in alone.tensors.items()}


def test_the_same_weights_in_hugging_faces_form_give_the_same_artifact(tmp_path: Path, states: dict[str, Any]) -> None:
    """The config.json is the one that is made from params.json, so that reading it back is tested too."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    meta = open_checkpoint(write_meta(tmp_path / "meta", MAVERICK, published(states["maverick"]), 4))
    twin = tmp_path / "hf"
    twin.mkdir()
    for name in ("config.json", "generation_config.json"):
        (twin / name).write_bytes(meta.generated[name])
    tensors = {name: value.contiguous().clone() for name, value in canonical(states["maverick"]).items()}
    save_sharded(twin, tensors, 1)
    model, loading = Llama4ForCausalLM.from_pretrained(
        twin, config=Llama4TextConfig.from_pretrained(twin), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    hf = open_checkpoint(twin)
    assert hf.config == meta.config
    for name, value in model.state_dict().items():
        ours = meta.tensors[name].tobytes()
        assert ours == hf.tensors[name].tobytes() == value.contiguous().view(torch.uint8).numpy().tobytes(), name
    for path in (tmp_path / "meta", twin):
        convert(ConvertOptions(path, path.with_suffix(".out"), recipe="int4"))
    for file in ("model.onnx", "model.safetensors", "config.json", "genai_config.json"):
        assert (tmp_path / "meta.out" / file).read_bytes() == (tmp_path / "hf.out" / file).read_bytes(), file


def test_a_folder_that_holds_both_formats_is_read_as_hugging_faces(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "both"))
    (path / "model.safetensors").write_bytes(b"")
    assert_refused(lambda: open_checkpoint(path), ["config.json"])


def test_files_that_decide_the_result_are_named(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "ckpt"))
    write_ranks(path / "tokenizer.model", MAVERICK["vocab_size"] - RESERVED)
    names = [file.name for file in open_checkpoint(path).files]
    assert names == ["params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"]


def edit(path: Path, change: Callable[[dict[str, Any]], Any], files: str = "consolidated.*.pth") -> None:
    for file in path.glob(files):
        state = torch.load(file, weights_only=False)
        change(state)
        torch.save(state, file)


def each(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path, change)


def first(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path, change, "consolidated.00.pth")


WQKV, GATE = "layers.0.attention.wqkv.weight", f"layers.1.feed_forward.experts.{EXPERTS['w1']}"
ROUTER, DOWN = "layers.1.feed_forward.router_DE", f"layers.1.feed_forward.{SHARED['w2']}.weight"

DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no params": (lambda p: (p / "params.json").unlink(), ["params.json", "no such file"]),
    "no weights": (lambda p: [f.unlink() for f in p.glob("*.pth")], ["consolidated.00.pth"]),
    "no first file": (lambda p: (p / "consolidated.00.pth").unlink(), ["consolidated.00.pth"]),
    "no second of three": (
        lambda p: (p / "consolidated.01.pth").rename(p / "consolidated.02.pth"), ["consolidated.01.pth"],
    ),
    "an optimizer beside": (lambda p: (p / "optimizer.pth").write_bytes(b""), ["pth"]),
    "a dangling link": (
        lambda p: ((p / "consolidated.01.pth").unlink(), (p / "consolidated.01.pth").symlink_to("nowhere")),
        ["consolidated.01.pth", "link"],
    ),
    "a folder": (
        lambda p: ((p / "consolidated.01.pth").unlink(), (p / "consolidated.01.pth").mkdir()), ["consolidated.01.pth"],
    ),
    "a missing tensor": (each(lambda s: s.pop(WQKV)), ["layers.0.attention.wq.weight", "missing"]),
    "a tensor missing in one file": (first(lambda s: s.pop(WQKV)), [WQKV, "consolidated.00.pth"]),
    "no embeddings": (each(lambda s: s.pop("tok_embeddings.weight")), ["tok_embeddings.weight"]),
    "a tensor too many": (each(lambda s: s.update(extra=torch.zeros(1))), ["extra", "params.json"]),
    "both spellings": (each(lambda s: s.update({"layers.0.attention_norm.weight": torch.zeros(64)})), ["layer_norm"]),
    "another shape": (each(lambda s: s.update({ROUTER: torch.zeros(64, 5)})), [ROUTER, "[64, 5]"]),
    "another number of axes": (each(lambda s: s.update({ROUTER: torch.zeros(64)})), [ROUTER, "1 axes"]),
    "another shape in one file": (first(lambda s: s.update({ROUTER: torch.zeros(64, 5)})), [ROUTER, "[64, 5]"]),
    "another type in one file": (first(lambda s: s.update({ROUTER: s[ROUTER].float()})), [ROUTER, "FLOAT"]),
    "rows that cannot be shared out": (each(lambda s: s.update({WQKV: s[WQKV][:-1]})), [WQKV, "equal shares"]),
    "fewer rows": (each(lambda s: s.update({WQKV: s[WQKV][:48]})), [WQKV, "q_proj"]),
    "narrow experts": (each(lambda s: s.update({GATE: s[GATE][:, :8].clone()})), [GATE, "shape"]),
    "experts of another type": (each(lambda s: s.update({GATE: s[GATE].float()})), ["experts", "types"]),
    "experts in four axes": (each(lambda s: s.update({GATE: s[GATE][None, None]})), [GATE, "shape"]),
    "a transposed view of experts": (
        each(lambda s: s.update({GATE: s[GATE].t().contiguous().t()})), [GATE, "transposed view"],
    ),
    "integers": (each(lambda s: s.update({DOWN: s[DOWN].int()})), [DOWN, "INT32"]),
    "doubles": (each(lambda s: s.update({DOWN: s[DOWN].double()})), [DOWN, "DOUBLE"]),
    "fp8 without scales": (each(lambda s: s.update({GATE: s[GATE].to(torch.float8_e4m3fn)})), [GATE, "FLOAT8E4M3FN"]),
    "a text": (each(lambda s: s.update(note="hello")), ["note", "no tensor"]),
    "a nested state dict": (
        lambda p: [torch.save({"model": torch.load(f, weights_only=False)}, f) for f in p.glob("*.pth")],
        ["model", "no tensor"],
    ),
    "another model's params": (
        lambda p: (p / "params.json").write_text(json.dumps({**MAVERICK, "n_layers": 3})), ["layers.3", "params.json"],
    ),
    "experts that cannot be shared out": (
        lambda p: (p / "params.json").write_text(json.dumps({**MAVERICK, "multiple_of": 33})), ["params.json"],
    ),
    "another vocabulary": (
        lambda p: (p / "params.json").write_text(json.dumps({**MAVERICK, "vocab_size": 99})), ["tok_embeddings"],
    ),
    "a tokenizer of another vocabulary": (lambda p: write_ranks(p / "tokenizer.model", 290), ["tokenizer.model"]),
    "a tokenizer linked from elsewhere": (
        lambda p: (p / "tokenizer.model").symlink_to(write_ranks(p.parent / "t.model", 296)), ["tokenizer.model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused_by_the_name_of_file_and_tensor(folder: Path, tmp_path: Path, kind: str) -> None:
    change, mentions = DAMAGE[kind]
    path = Path(shutil.copytree(folder, tmp_path / "ckpt"))
    change(path)
    assert_refused(lambda: open_checkpoint(path), mentions)
