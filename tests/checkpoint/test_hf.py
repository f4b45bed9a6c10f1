from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from l4convert.checkpoint import open_checkpoint
from tests.checkpoint.refusals import assert_refused
from tests.checkpoints import MAVERICK, write_random_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")


def torch_state(path: Path, conditional: bool = False) -> dict[str, torch.Tensor]:
    """The state dict of the text decoder that transformers makes of a checkpoint."""
    from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

    kind: Any = Llama4ForConditionalGeneration if conditional else Llama4ForCausalLM
    model = kind.from_pretrained(path)
    state: dict[str, torch.Tensor] = (model.language_model if conditional else model).state_dict()
    return state


def assert_equals(path: Path, state: dict[str, torch.Tensor]) -> None:
    tensors = open_checkpoint(path).tensors
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert tensor.dims == tuple(state[name].shape)
        assert tensor.tobytes() == state[name].contiguous().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16", "shards": 3},
        {"dtype": "float32", "attention_bias": True, **MAVERICK},
        {"conditional": True, "shards": 2},
    ],
    ids=["single", "sharded", "maverick", "conditional"],
)
def test_every_tensor_equals_what_transformers_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_random_checkpoint(tmp_path / "model", **options)
    assert_equals(path, torch_state(path, bool(options.get("conditional"))))


def test_a_checkpoint_that_transformers_saved_in_shards(tmp_path: Path, scout_layout: Path) -> None:
    from transformers import Llama4ForCausalLM

    Llama4ForCausalLM.from_pretrained(scout_layout).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equals(tmp_path, torch_state(scout_layout))


def test_facts_about_a_checkpoint(scout_layout: Path) -> None:
    checkpoint = open_checkpoint(scout_layout)
    assert (checkpoint.path, checkpoint.format, checkpoint.experts) == (scout_layout, "hf", "stacked")
    assert [file.name for file in checkpoint.files] == ["config.json", "model.safetensors"]
    assert [file.name for file in checkpoint.sidecars] == ["config.json"]


def test_unfused_experts_are_the_columns_of_the_stacked_ones(tmp_path: Path, scout_layout: Path) -> None:
    unfused = open_checkpoint(write_random_checkpoint(tmp_path / "unfused", unfused=True, shards=3))
    assert unfused.experts == "unfused"
    stacked = open_checkpoint(scout_layout).tensors
    prefix = "model.layers.2.feed_forward.experts."
    gate_up, down = stacked[prefix + "gate_up_proj"].numpy(), stacked[prefix + "down_proj"].numpy()
    for expert in range(4):
        both = [unfused.tensors[f"{prefix}{expert}.{name}_proj.weight"].numpy() for name in ("gate", "up")]
        assert (both[0] == gate_up[expert, :, :64].T).all()
        assert (both[1] == gate_up[expert, :, 64:].T).all()
        assert (unfused.tensors[f"{prefix}{expert}.down_proj.weight"].numpy() == down[expert].T).all()


def rename(path: Path, change: Callable[[str], str]) -> None:
    """Rename the tensors of a single-file checkpoint."""
    tensors = load_file(path / "model.safetensors")
    save_file({change(name): tensor for name, tensor in tensors.items()}, path / "model.safetensors")


def test_text_decoder_under_model_language_model(tmp_path: Path, scout_layout: Path) -> None:
    path = write_random_checkpoint(tmp_path / "model", conditional=True)
    vision = ("vision_model.", "multi_modal_projector.")
    rename(
        path,
        lambda name: (
            f"model.{name}"
            if name.startswith(vision)
            else name.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            )
        ),
    )
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in load_file(path / "model.safetensors")
    assert_equals(path, torch_state(scout_layout))


@pytest.mark.parametrize("copy", [False, True], ids=["absent", "a copy"])
def test_a_tied_output_layer_is_not_a_tensor(tmp_path: Path, copy: bool) -> None:
    path = write_random_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    if copy:
        edit(path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensors


def test_old_rope_buffers_are_ignored(tmp_path: Path, scout_layout: Path) -> None:
    path = copy_of(scout_layout, tmp_path)
    edit(path / "model.safetensors", lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    assert_equals(path, torch_state(scout_layout))


def test_one_file_of_another_name_is_enough(tmp_path: Path, scout_layout: Path) -> None:
    path = copy_of(scout_layout, tmp_path)
    (path / "model.safetensors").rename(path / "weights.safetensors")
    assert [file.name for file in open_checkpoint(path).files] == ["config.json", "weights.safetensors"]


def test_sidecars_are_the_files_that_are_there(tmp_path: Path, scout_layout: Path) -> None:
    path = copy_of(scout_layout, tmp_path)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "notes.txt"):
        (path / name).write_text("{}")
    (path / "tokenizer_config.json").mkdir()
    names = {file.name for file in open_checkpoint(path).sidecars}
    assert names == {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}


@needs_links
def test_a_hugging_face_cache_of_links(tmp_path: Path, scout_layout: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(scout_layout.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert_equals(snapshot, torch_state(scout_layout))


def test_tiny_scout(tiny_scout: Path) -> None:
    checkpoint = open_checkpoint(tiny_scout)
    assert sum(tensor.size for tensor in checkpoint.tensors.values()) == pytest.approx(16.5e6, rel=0.01)
    assert {file.name for file in checkpoint.sidecars} >= {"tokenizer.json", "tokenizer_config.json"}


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """The data may be a hole of 100 GB in the file: only its header matters."""
    config = {"model_type": "llama4_text", "hidden_size": 5120, "num_hidden_layers": 1, "vocab_size": 202048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    from l4convert.checkpoint.hf_config import read_config
    from l4convert.checkpoint.names import expected_tensors

    header, end = {}, 0
    for name, shape in expected_tensors(read_config(tmp_path / "config.json"), "stacked").items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    experts = open_checkpoint(tmp_path).tensors["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert experts.dims == (16, 5120, 16384)
    assert not experts.tile(15, slice(5119, 5120), slice(0, 4)).any()


# --- what is refused ---------------------------------------------------------------------------------------------


def copy_of(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "checkpoint"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors file's dict of tensors in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_map(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(path / INDEX, lambda index: change(index["weight_map"]))


def set_file(path: Path, tensor: str, file: Any) -> None:
    edit_map(path, lambda weights: weights.update({tensor: file}))


def everywhere(path: Path, change: Callable[[dict[str, Any]], object], shard: str = FIRST) -> None:
    """Change one shard's tensors and the index with it."""
    before = load_file(path / shard).keys()
    edit(path / shard, change)
    after = load_file(path / shard).keys()
    edit_map(path, lambda weights: [weights.pop(name) for name in before - after])
    edit_map(path, lambda weights: weights.update(dict.fromkeys(after, shard)))


def replace(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = json.loads((path / INDEX).read_text())["weight_map"][name]
    edit(path / shard, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def drop(path: Path, *names: str) -> None:
    for shard in (FIRST, SECOND, THIRD):
        everywhere(path, lambda tensors: [tensors.pop(name, None) for name in names], shard)


def cut(file: Path, length: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(length if length >= 0 else file.stat().st_size + length)


def relink(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
ROUTER = "model.layers.1.feed_forward.router.weight"
GATE_UP = "model.layers.1.feed_forward.experts.gate_up_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json", "no such file"]),
    "config is a folder": (
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
        ["config.json", "not a file"],
    ),
    "no weights": (
        lambda p: [file.unlink() for file in p.glob("model*")] and (p / "pytorch_model.bin").touch(),
        ["no model.safetensors", "only safetensors"],
    ),
    "index gone": (lambda p: (p / INDEX).unlink(), ["3 safetensors files", INDEX]),
    "index is a folder": (lambda p: ((p / INDEX).unlink(), (p / INDEX).mkdir()), [INDEX, "not a file"]),
    "index cut": (lambda p: cut(p / INDEX, 100), [INDEX, "not valid JSON"]),
    "index empty": (lambda p: cut(p / INDEX, 0), [INDEX, "not valid JSON"]),
    "index is a list": (lambda p: (p / INDEX).write_text("[]"), [INDEX, "object was expected"]),
    "index too deep": (lambda p: (p / INDEX).write_text('{"a":' * 10**5), [INDEX, "nested too deeply"]),
    "index too large": (lambda p: cut(p / INDEX, 200_000_000), [INDEX, "200,000,000 bytes"]),
    "index without map": (lambda p: (p / INDEX).write_text('{"metadata": {}}'), [INDEX, "weight_map"]),
    "empty map": (lambda p: (p / INDEX).write_text('{"weight_map": {}}'), [INDEX, "weight_map"]),
    "map is a list": (lambda p: (p / INDEX).write_text('{"weight_map": []}'), [INDEX, "weight_map", "an object"]),
    "tensor twice in map": (
        lambda p: (p / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        [INDEX, "'a'", "twice"],
    ),
    "file name is a number": (lambda p: set_file(p, EMBED, 1), [INDEX, EMBED, "no plain file name"]),
    "file name is null": (lambda p: set_file(p, EMBED, None), [INDEX, EMBED, "no plain file name"]),
    "file name is empty": (lambda p: set_file(p, EMBED, ""), [INDEX, EMBED, "no plain file name"]),
    "file in the parent": (lambda p: set_file(p, EMBED, f"../{FIRST}"), [INDEX, EMBED, "../", "no plain file name"]),
    "the parent itself": (lambda p: set_file(p, EMBED, ".."), [INDEX, EMBED, "no plain file name"]),
    "file in a subfolder": (lambda p: set_file(p, EMBED, f"a/{FIRST}"), [INDEX, EMBED, "no plain file name"]),
    "absolute file": (lambda p: set_file(p, EMBED, "/etc/passwd"), [INDEX, EMBED, "no plain file name"]),
    "backslashes": (lambda p: set_file(p, EMBED, "..\\x"), [INDEX, EMBED, "no plain file name"]),
    "drive": (lambda p: set_file(p, EMBED, "c:x"), [INDEX, EMBED, "no plain file name"]),
    "file name of two lines": (lambda p: set_file(p, EMBED, "a\nb"), [INDEX, EMBED, r"'a\nb'"]),
    "NUL in a file name": (lambda p: set_file(p, EMBED, "a\0"), [INDEX, EMBED, "no plain file name"]),
    "endless file name": (lambda p: set_file(p, EMBED, "a" * 10**6), [INDEX, EMBED, "no plain file name"]),
    "file name too long for the disk": (lambda p: set_file(p, EMBED, "\u00e9" * 255), ["cannot be read"]),
    "a shard is absent": (lambda p: (p / SECOND).unlink(), [SECOND, "absent", "download"]),
    "two shards are absent": (lambda p: [(p / s).unlink() for s in (SECOND, THIRD)], [SECOND, "(and 1 more)"]),
    "a shard is a folder": (lambda p: ((p / SECOND).unlink(), (p / SECOND).mkdir()), [SECOND, "absent"]),
    "absent before malformed": (lambda p: (cut(p / FIRST, 9), (p / THIRD).unlink()), [THIRD, "absent"]),
    "shard cut in its data": (lambda p: cut(p / SECOND, -10), [SECOND, "truncated, 10 bytes missing", "'"]),
    "shard cut in its header": (lambda p: cut(p / SECOND, 50), [SECOND, "truncated inside the header"]),
    "shard empty": (lambda p: cut(p / SECOND, 0), [SECOND, "not a safetensors file"]),
    "shard too long": (lambda p: cut(p / SECOND, (p / SECOND).stat().st_size + 7), [SECOND, "7 bytes after"]),
    "shard is a pointer": (
        lambda p: (p / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"),
        [SECOND, "Git LFS", "git lfs pull"],
    ),
    "listed but not in its shard": (
        lambda p: edit(p / FIRST, lambda t: t.pop(next(iter(t)))),
        [FIRST, "is missing", INDEX],
    ),
    "listed in the wrong shard": (
        lambda p: edit_map(p, lambda m: m.update({NORM: FIRST if m[NORM] != FIRST else SECOND})),
        [NORM, "is missing", INDEX],
    ),
    "in a shard but not listed": (lambda p: edit_map(p, lambda m: m.pop(NORM)), [NORM, "not listed", INDEX]),
    "in two shards": (
        lambda p: [edit(p / s, lambda t: t.update({NORM: torch.ones(64)})) for s in (FIRST, SECOND, THIRD)],
        [SECOND, NORM, f"also in {FIRST}"],
    ),
    "missing": (lambda p: drop(p, ROUTER), [INDEX, f"'{ROUTER}' is missing [", "download"]),
    "several missing": (lambda p: drop(p, ROUTER, NORM, Q_PROJ), [INDEX, f"'{Q_PROJ}' is missing (and 2 more)"]),
    "no output layer": (lambda p: drop(p, "lm_head.weight"), ["'lm_head.weight' is missing", "tie_word_embeddings"]),
    "no tensors": (
        lambda p: drop(p, *json.loads((p / INDEX).read_text())["weight_map"]),
        [INDEX, "weight_map", "empty"],
    ),
    "unexpected": (
        lambda p: everywhere(p, lambda t: t.update({"model.extra.weight": torch.ones(2)})),
        [FIRST, "'model.extra.weight' is not one"],
    ),
    "unexpected, of two lines": (
        lambda p: everywhere(p, lambda t: t.update({"a\nb": torch.ones(2), "c": torch.ones(1)})),
        [FIRST, r"a\nb", "(and 1 more)"],
    ),
    "a bias too many": (
        lambda p: everywhere(p, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        [FIRST, "'model.layers.0.self_attn.q_proj.bias' is not one"],
    ),
    "biases too few": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(attention_bias=True)),
        [INDEX, "'model.layers.0.self_attn.q_proj.bias' is missing (and 15 more)"],
    ),
    "a prefix on one tensor": (
        lambda p: everywhere(p, lambda t: t.update({"language_model.x": torch.ones(2)})),
        [FIRST, "'language_model.x' is not one"],
    ),
    "a layer too many": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(num_hidden_layers=3, moe_layers=[0, 1, 2])),
        ["'model.layers.3.", "is not one"],
    ),
    "a layer too few": (
        lambda p: edit_json(
            p / "config.json", lambda c: c.update(num_hidden_layers=5, no_rope_layers=[], layer_types=None)
        ),
        [INDEX, "'model.layers.4.input_layernorm.weight' is missing"],
    ),
    "dense by config": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(moe_layers=[0, 1, 2])),
        [INDEX, "'model.layers.3.feed_forward.gate_proj.weight' is missing (and 2 more)"],
    ),
    "both forms of experts": (
        lambda p: everywhere(
            p, lambda t: t.update({"model.layers.0.feed_forward.experts.0.up_proj.weight": torch.ones(64, 64)})
        ),
        [INDEX, "'model.layers.0.feed_forward.experts.0.gate_proj.weight' is missing"],
    ),
    "too few rows": (lambda p: replace(p, EMBED, lambda t: t[:-1]), [EMBED, "[127, 64]", "[128, 64]"]),
    "transposed experts": (
        lambda p: replace(p, GATE_UP, lambda t: t.transpose(1, 2)),
        [GATE_UP, "[4, 128, 64]", "[4, 64, 128]"],
    ),
    "flattened experts": (lambda p: replace(p, GATE_UP, lambda t: t.flatten(0, 1)), [GATE_UP, "[256, 128]"]),
    "transposed router": (lambda p: replace(p, ROUTER, lambda t: t.T), [ROUTER, "[64, 4]", "[4, 64]"]),
    "a scalar norm": (lambda p: replace(p, NORM, lambda t: t[0]), [NORM, "[]", "[64]"]),
    "int8 weights": (lambda p: replace(p, Q_PROJ, lambda t: t.to(torch.int8)), [Q_PROJ, "I8", "BF16, F16, F32"]),
    "float64 weights": (lambda p: replace(p, Q_PROJ, lambda t: t.double()), [Q_PROJ, "F64", "BF16, F16, F32"]),
    "fp8 weights": (
        lambda p: replace(p, Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)),
        [Q_PROJ, "F8_E4M3", "quantized checkpoints are not supported yet"],
    ),
    "quantized names": (
        lambda p: (drop(p, ROUTER), everywhere(p, lambda t: t.update({"x.qweight": torch.ones(2)}))),
        ["is missing", "quantized"],
    ),
}
LINKS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "config is a dangling link": (lambda p: relink(p / "config.json", p / "gone"), ["config.json", "link to a file"]),
    "index is a dangling link": (lambda p: relink(p / INDEX, p / "gone"), [INDEX, "link to a file"]),
    "shard is a dangling link": (lambda p: relink(p / FIRST, p / "gone"), [FIRST, "absent"]),
    "link to itself": (lambda p: relink(p / "config.json", p / "config.json"), ["config.json"]),
    "tokenizer from elsewhere": (
        lambda p: ((p.parent / "secret").write_text("x"), relink(p / "tokenizer.json", p.parent / "secret")),
        ["tokenizer.json", "outside the checkpoint"],
    ),
    "config is a pipe": (
        lambda p: ((p / "config.json").unlink(), os.mkfifo(p / "config.json")),
        ["config.json", "not a file"],
    ),
    "shard is a pipe": (lambda p: ((p / FIRST).unlink(), os.mkfifo(p / FIRST)), [FIRST, "absent"]),
    "index is a device": (lambda p: relink(p / INDEX, Path("/dev/zero")), [INDEX, "not a file"]),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("sharded"), shards=3)


@pytest.mark.parametrize(("damage", "mentions"), REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, sharded: Path, damage: Callable[[Path], object], mentions: list[str]
) -> None:
    path = copy_of(sharded, tmp_path)
    open_checkpoint(path)
    damage(path)
    assert_refused(lambda: open_checkpoint(path), mentions)


@needs_links
@pytest.mark.parametrize(("damage", "mentions"), LINKS.values(), ids=LINKS.keys())
def test_links_and_special_files_are_refused(
    tmp_path: Path, sharded: Path, damage: Callable[[Path], object], mentions: list[str]
) -> None:
    path = copy_of(sharded, tmp_path)
    damage(path)
    assert_refused(lambda: open_checkpoint(path), mentions)


def test_an_unfused_expert_that_is_missing(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "unfused", unfused=True)
    name = "model.layers.2.feed_forward.experts.3.down_proj.weight"
    edit(path / "model.safetensors", lambda tensors: tensors.pop(name))
    assert_refused(lambda: open_checkpoint(path), ["model.safetensors", f"'{name}' is missing"])


def test_a_missing_tensor_has_the_checkpoints_own_name(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "model", conditional=True)
    edit(path / "model.safetensors", lambda tensors: tensors.pop(f"language_model.{NORM}"))
    assert_refused(lambda: open_checkpoint(path), [f"'language_model.{NORM}' is missing"])
