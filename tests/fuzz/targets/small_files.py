"""Small files beside the weights: templates, tokenizers, settings of generation."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.hf_config import read_config
from l4convert.checkpoint.templates import check_sidecar
from l4convert.runtime.client_files import client_files
from l4convert.runtime.tokenizer import TextTokenizer
from tests.fuzz.target import OneFile, Target
from tests.fuzz.targets.checkpoints import checkpoint_folder
from tests.hostile import bases

NAMES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json", "special_tokens_map.json")
_files = [OneFile(name) for name in NAMES]
_generation = OneFile("generation_config.json")
_tokenizer = OneFile("tokenizer.json")


def parse_sidecar(data: bytes) -> None:
    """The first byte says which file it is."""
    check_sidecar(_files[data[0] % len(_files) if data else 0](data[1:]))


def parse_generation(data: bytes) -> None:
    """What public clients' files are made of."""
    client_files(_decoder(), "growing", [_generation(data)])


@functools.cache
def _decoder() -> DecoderConfig:
    return read_config(checkpoint_folder() / "config.json")


def parse_tokenizer(data: bytes) -> None:
    """Load it, and use it once."""
    tokenizer = TextTokenizer.open(Path(_tokenizer(data)).parent)
    tokenizer.decode(tokenizer.encode("abc"))


SIDECARS = Target(
    parse_sidecar,
    lambda: [
        b"\0" + bases.TEMPLATE.encode(),
        b"\1" + json.dumps({"chat_template": bases.TEMPLATE, "model_max_length": 1}).encode(),
        b"\1" + json.dumps({"chat_template": [{"name": "default", "template": bases.TEMPLATE}]}).encode(),
        b"\2" + json.dumps({"chat_template": bases.TEMPLATE}).encode(),
        b"\3" + json.dumps({"bos_token": {"content": "a", "lstrip": False}}).encode(),
    ],
    ("__", "|attr", "{% import", "\\x5f", "\\u005f", "chat_template", "template"),
    form="json",
)
GENERATION: Mapping[str, Any] = {
    "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9, "top_k": 50,
    "do_sample": True, "max_length": 20, "min_length": 0, "repetition_penalty": 1.0, "num_beams": 1,
}  # fmt: skip
BYTE_LEVEL: Mapping[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
SEQUENCES = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
PROCESSOR: Mapping[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, SEQUENCES[0]],
    "pair": SEQUENCES,
    "special_tokens": {"a": {"id": "a", "ids": [0], "tokens": ["a"]}},
}
CLIENT_FILES = Target(
    parse_generation,
    lambda: [json.dumps(GENERATION).encode(), b"{}"],
    ('"eos_token_id"', '"temperature"', '"do_sample"'),
    form="json",
)
TOKENIZER = Target(
    parse_tokenizer,
    lambda: [
        json.dumps({**bases.tokenizer(), **more}).encode()
        for more in ({}, {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}, {"post_processor": PROCESSOR})
    ],
    ('"ByteLevel"', '"BPE"', '"Split"', '"Regex"', '"Sequence"', '"merges"', '"vocab"', '"added_tokens"'),
    form="json",
)
