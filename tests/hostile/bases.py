"""The valid inputs that are damaged: a tiny Llama 4 in Hugging Face's layout, in one file or two, and its artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from l4convert.checkpoint.hf_config import read_config
from l4convert.checkpoint.names import expected_tensors
from tests.hostile.files import FIRST, INDEX, SECOND, SINGLE, write_safetensors

CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 2,
    "max_position_embeddings": 256,
    "attention_chunk_size": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
TEMPLATE = "{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Random weights of the names and shapes that the folder's config.json gives."""
    random = np.random.default_rng(0)
    shapes = expected_tensors(read_config(folder / "config.json"), "stacked")
    return {name: random.normal(0, 0.1, shape).astype(np.float16) for name, shape in shapes.items()}


def checkpoint(folder: Path) -> None:
    """config.json, one safetensors file, and the small files that go into an artifact."""
    _small_files(folder)
    write_safetensors(folder / SINGLE, tensors(folder))


def sharded(folder: Path) -> None:
    """The same in two files with an index."""
    _small_files(folder)
    weights = tensors(folder)
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for file, part in ((FIRST, names[::2]), (SECOND, names[1::2])):
        write_safetensors(folder / file, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}))


def artifact(folder: Path) -> None:
    """What ``convert`` makes of the checkpoint, in INT4."""
    from l4convert.options import ConvertOptions
    from l4convert.pipeline import convert

    source = folder.parent / "checkpoint"
    checkpoint(source)
    convert(ConvertOptions(checkpoint=source, output=folder, recipe="int4"))


def _small_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    small: dict[str, Any] = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE},
        "special_tokens_map.json": {"bos_token": "a"},
        "tokenizer.json": tokenizer(),
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, content in small.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def tokenizer() -> dict[str, Any]:
    """A tokenizer of single letters, as the tokenizers library writes one."""
    letters = [chr(ord("a") + i) if i < 26 else f"<{i}>" for i in range(64)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {letter: index for index, letter in enumerate(letters)}, "merges": [],
        },
    }  # fmt: skip
