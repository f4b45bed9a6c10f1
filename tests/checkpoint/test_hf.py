from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from l4convert.checkpoint import open_checkpoint
from l4convert.errors import InputError
from tests.checkpoint.damage import copy_of, edit, needs_links
from tests.checkpoints import MAVERICK, write_random_checkpoint


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
    names = {file.name for file in open_checkpoint(path).sidecars}
    assert names == {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    (path / "tokenizer_config.json").mkdir()
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is not a file"):
        open_checkpoint(path)


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
