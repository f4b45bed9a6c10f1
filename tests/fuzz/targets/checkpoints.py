"""Files of a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from l4convert.checkpoint.hf import _read_index
from l4convert.checkpoint.hf_config import read_config
from l4convert.checkpoint.safetensors_file import DTYPES, open_safetensors
from tests.fuzz.target import OneFile, Target, folder_in_memory
from tests.hostile import bases, files

DATA_BYTES = 64
READ_BYTES = 1 << 16

_folder = folder_in_memory()
_shard = OneFile("model.safetensors")
_index = OneFile(files.INDEX)
_config = OneFile("config.json")


def parse_safetensors(data: bytes) -> None:
    """A whole file, or after an odd byte only its header's text, so that the length in front of it is right."""
    header = data[1:]
    if data[:1] and data[0] % 2:
        header = len(header).to_bytes(8, "little") + header + bytes(DATA_BYTES)
    for tensor in open_safetensors(_shard(header)).values():
        if tensor.nbytes < READ_BYTES:
            assert len(tensor.tobytes()) == tensor.nbytes


def safetensors_seeds() -> list[bytes]:
    """Both forms, of every dtype."""
    names = [name for name in DTYPES if name != "F64"]
    sizes = {name: DTYPES[name].numpy().itemsize for name in names}
    header, end = {}, 0
    for name in ("F16", "BF16", "F32", "F8_E4M3", "I8", "I32"):
        header[name] = {"dtype": name, "shape": [2, 2], "data_offsets": [end, end + 4 * sizes[name]]}
        end += 4 * sizes[name]
    header["rest"] = {"dtype": "U8", "shape": [DATA_BYTES - end], "data_offsets": [end, DATA_BYTES]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(DATA_BYTES)
    one = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    empty = json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return [b"\0" + whole, b"\1" + text, b"\1" + one, b"\1" + empty, b"\1{}"]


SAFETENSORS = Target(
    parse_safetensors,
    safetensors_seeds,
    ('"dtype"', '"shape"', '"data_offsets"', "__metadata__", "[0,0]", *(f'"{name}"' for name in DTYPES)),
    form="json",
)

INDEX = Target(
    lambda data: _read_index(_index(data)),
    lambda: [
        json.dumps(
            {"metadata": {"total_size": 1}, "weight_map": {files.EMBED: files.FIRST, "b": files.SECOND}}
        ).encode(),
        b'{"weight_map": {"a": "model.safetensors"}}',
    ],
    ('"weight_map"', '"metadata"', "../", "\\u0000", "safetensors"),
    form="json",
)


@functools.cache
def config_seeds() -> list[bytes]:
    """Both kinds of configs, scaled and unscaled RoPE, old and new spellings."""
    scaled = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    old = {k: v for k, v in bases.CONFIG.items() if k != "rope_parameters"}
    full = {
        **bases.CONFIG, "rope_parameters": scaled, "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0], "moe_layers": [1], "eos_token_id": [2, 3], "attn_temperature_tuning": 4,
        "tie_word_embeddings": False, "attention_bias": False, "interleave_moe_layer_step": 1, "hidden_act": "silu",
        "pad_token_id": -1, "rms_norm_eps": 1e-5, "use_qk_norm": True, "floor_scale": 8192, "attn_scale": 0.1,
    }  # fmt: skip
    conditional = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": full}
    return [
        json.dumps(value).encode()
        for value in (bases.CONFIG, {**old, "rope_scaling": scaled, "rope_theta": 5e5}, full, conditional)
    ]


CONFIG = Target(
    lambda data: read_config(_config(data)),
    config_seeds,
    (*(f'"{key}"' for key in bases.CONFIG), "null", "NaN", "Infinity", "1e999", "true", '"text_config"'),
    form="json",
)


@functools.cache
def checkpoint_folder() -> Path:
    """A valid checkpoint that lives as long as the process."""
    folder = Path(_folder.name) / f"checkpoint-{os.getpid()}"  # targets are forks of one process
    bases.checkpoint(folder)
    return folder
