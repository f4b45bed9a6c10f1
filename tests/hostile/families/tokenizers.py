"""tokenizer.json, as ``convert --calibration`` reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.bases import checkpoint, tokenizer
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import cut, edit_json, folder_instead, link, pipe, remove, sparse, text

FILE = "tokenizer.json"


def base(folder: Path) -> None:
    """The checkpoint and a text to calibrate on."""
    checkpoint(folder)
    (folder / "text.txt").write_text("abcdefghij" * 60)


def model(**values: Any) -> Callable[[Path], None]:
    return edit_json(FILE, lambda content: content["model"].update(values))


def whole(**values: Any) -> Callable[[Path], None]:
    return edit_json(FILE, lambda content: content.update(values))


def said(damage: Damage, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return damage, (FILE, *names)


VOCAB = tokenizer()["model"]["vocab"]
FAMILY = Family(
    base=base,
    command=(
        "convert",
        "{input}",
        "--output",
        "{out}",
        "--kv-dtype",
        "int8",
        "--calibration",
        "{input}/text.txt",
    ),
    cases=cases(
        {
            "not JSON": said(text(FILE, "tokenizer"), "tokenizer"),
            "absent": said(remove(FILE)),
            "empty": said(text(FILE, "")),
            "cut": said(cut(FILE, 300)),
            "a list": said(text(FILE, "[]")),
            "nested": said(text(FILE, '{"model":' * 100_000)),
            "a folder": said(folder_instead(FILE)),
            "a pipe": said(pipe(FILE)),
            "a device": said(link(FILE, "/dev/zero")),
            "a terabyte": said(sparse(FILE, 1 << 40), "bytes"),
            "60 MB of zeros": said(sparse(FILE, 60_000_000)),
            "no model": said(whole(model=None)),
            "a model of an unknown type": said(model(type="Exec")),
            "a vocabulary of text": said(model(vocab="abc")),
            "an empty vocabulary": (model(vocab={}), ()),
            "negative ids": said(model(vocab={**VOCAB, "a": -1})),
            "ids beyond 32 bits": said(model(vocab={**VOCAB, "a": 2**33})),
            "ids outside the model": said(model(vocab={chr(97 + i): 1000 + i for i in range(26)}), "vocabulary"),
            "an id of 4e9": said(model(vocab={**VOCAB, "a": 2**32 - 1}), "vocabulary"),
            "merges out of the vocabulary": said(model(merges=["zz qq"])),
            "merges of numbers": said(model(merges=[1, 2])),
            "a merge of three": said(model(merges=["a b c"])),
            "a pre-tokenizer that is unknown": said(whole(pre_tokenizer={"type": "Shell", "command": "touch canary"})),
            "a regular expression that is none": said(
                whole(
                    pre_tokenizer={
                        "type": "Split",
                        "pattern": {"Regex": "(((("},
                        "behavior": "Isolated",
                        "invert": False,
                    }
                )
            ),
            "a decoder that is unknown": said(whole(decoder={"type": "Exec"})),
            "a post-processor that changes tokens": said(
                whole(
                    post_processor={
                        "type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "z", "type_id": 0}}],
                        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                        "special_tokens": {"z": {"id": "z", "ids": [25], "tokens": ["z"]}},
                    }
                )
            ),
            "a version that is unknown": said(whole(version="9.9")),
            "added tokens of numbers": said(whole(added_tokens=[1])),
            "a normalizer that deletes everything": (
                whole(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}),
                (),
            ),
            "dropout of 2": said(model(dropout=2.0)),
            "a key twice": said(text(FILE, json.dumps(tokenizer())[:-1] + ', "version": "2"}')),
        }
    ),
)
