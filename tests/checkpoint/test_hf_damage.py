from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from tests.checkpoint.damage import (
    FIRST,
    INDEX,
    SECOND,
    THIRD,
    copy_of,
    cut,
    drop,
    edit,
    edit_json,
    edit_map,
    everywhere,
    needs_links,
    relink,
    replace,
    set_file,
)
from tests.checkpoint.refusals import assert_refused
from tests.checkpoints import write_random_checkpoint

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
    "file name too long for the disk": (lambda p: set_file(p, EMBED, "\u00e9" * 255), ["no plain file name"]),
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
        [Q_PROJ, "F8_E4M3", "is F8_E4M3, expected one of"],
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
        ["tokenizer.json", "outside of its folder"],
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
