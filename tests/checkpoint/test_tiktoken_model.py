"""tokenizer.model: the tokens of Meta's own Tokenizer and of tiktoken, for the published file and for small ones."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.tiktoken_model import PATTERN, read_ranks, special_token_ids, special_tokens, tokenizer_json
from l4convert.runtime.tokenizer import TextTokenizer
from tests.checkpoint.refusals import assert_refused
from tests.meta_checkpoints import write_ranks

TEXTS = (
    "",
    " ",
    "the thing and the other thing, is it in there?",
    "It's I'LL don't WE'VE 12345 3.14\r\n//x\n\n",
    "    \n\n\t  x  ",
    "h\u00e9llo w\u00f6rld \u4f60\u597d \U0001f389\u200d\U0001f469 \u05e9\u05dc\u05d5\u05dd",
    "\x00\x7f\xa0\u2028",
    "<|header_start|>user<|header_end|>\n\nHi<|eot|>",
    "<|begin_of_text|><|image|><|patch|>",
    "<|not_special|>",
    "a" * 999,
)


@pytest.fixture(scope="module")
def published() -> Path:
    """The file that Llama 4 is released with, which is in Meta's package."""
    import llama_models

    return Path(str(llama_models.__file__)).parent / "llama4" / "tokenizer.model"


@pytest.fixture(scope="module")
def both(published: Path) -> tuple[Any, TextTokenizer]:
    from llama_models.llama4.tokenizer import Tokenizer

    content = tokenizer_json(read_ranks(published))
    return Tokenizer(published), TextTokenizer.parse(content, "tokenizer.json")


def theirs_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, bos=True, eos=False, allowed_special="all")
    return ids


def test_special_tokens_and_the_pattern_are_metas(both: tuple[Any, TextTokenizer]) -> None:
    assert special_token_ids(202048) == both[0].special_tokens
    assert len(special_tokens()) == 2048
    assert PATTERN == both[0].O200K_PATTERN
    ids = special_token_ids(202048)
    assert [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]] == both[0].stop_tokens
    assert ids["<|finetune_right_pad|>"] == both[0].pad_id


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_the_published_tokenizer_are_metas(both: tuple[Any, TextTokenizer], text: str) -> None:
    assert both[1].encode(text) == theirs_of(both[0], text)


def test_tokens_of_this_repository_are_metas(both: tuple[Any, TextTokenizer]) -> None:
    for file in Path(__file__).parents[2].glob("**/*.md"):
        text = file.read_text()[:5_000]
        ids = both[1].encode(text)
        assert ids == theirs_of(both[0], text), file
        assert both[0].decode(ids) == "<|begin_of_text|>" + text


@given(st.text(max_size=60))
@settings(max_examples=60)
def test_tokens_of_any_text_are_metas(both: tuple[Any, TextTokenizer], text: str) -> None:
    assert both[1].encode(text) == theirs_of(both[0], text)


def test_tokens_of_a_small_file_are_tiktokens(tmp_path: Path) -> None:
    import tiktoken

    tokens = read_ranks(write_ranks(tmp_path / "tokenizer.model", 320))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_token_ids(2368))
    ours = TextTokenizer.parse(tokenizer_json(tokens), "tokenizer.json")
    for text in TEXTS:
        assert ours.encode(text, special=False) == theirs.encode(text, allowed_special="all")
    assert ours.prefix_ids == (320,)
    assert ours.suffix_ids == ()


def test_transformers_reads_what_is_made(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from l4convert.checkpoint.hf_files import tokenizer_config_json

    tokens = read_ranks(write_ranks(tmp_path / "tokenizer.model", 300))
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(tokens))
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad|>"}
    (tmp_path / "tokenizer_config.json").write_bytes(tokenizer_config_json(names, 1000))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), TextTokenizer.open(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (300, 301, 318)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


BYTES = [bytes([byte]) for byte in range(256)]
BAD: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
    "empty": (lambda d: b"", ["tokenizer.model"]),
    "no base64": (lambda d: d + b"!!!! 256\n", ["line 257", "base64"]),
    "no rank": (lambda d: d + b"AAAA\n", ["line 257"]),
    "three words": (lambda d: d + b"AAAA 256 1\n", ["line 257"]),
    "a rank below zero": (lambda d: d + b"AAAA -1\n", ["line 257"]),
    "a rank that is text": (lambda d: d + b"AAAA x\n", ["line 257"]),
    "a rank of a gigabyte": (lambda d: d + b"AAAA " + b"9" * 100_000 + b"\n", ["line 257"]),
    "a rank twice": (lambda d: d + b"AAAA 255\n", ["rank 255", "twice"]),
    "a rank left out": (lambda d: d + b"AAAA 257\n", ["257"]),
    "a token twice": (lambda d: d + b"AA== 256\n", ["token occurs twice"]),
    "an empty token": (lambda d: d + b" 256\n", ["line 257"]),
    "a long token": (lambda d: d + base64.b64encode(b"a" * 300) + b" 256\n", ["300 bytes"]),
    "a byte without a token": (lambda d: lines(BYTES[:-1]), ["1 of 256 bytes"]),
    "a million lines": (lambda d: b"\n" * 1_000_000, ["lines"]),
    "many megabytes": (lambda d: b"a" * 9_000_000, ["9,000,000"]),
    "not text": (lambda d: d + b"\xff\xfe 256\n", ["line 257"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_malformed_files_are_refused_by_line(tmp_path: Path, kind: str) -> None:
    change, mentions = BAD[kind]
    (tmp_path / "tokenizer.model").write_bytes(change(lines(BYTES)))
    assert_refused(lambda: read_ranks(tmp_path / "tokenizer.model"), ["tokenizer.model", *mentions])


def test_a_vocabulary_that_can_be_made_in_too_many_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from l4convert.checkpoint import tiktoken_model

    monkeypatch.setattr(tiktoken_model, "MAX_MERGES", 10)
    tokens = [*BYTES, *(b"a" * length for length in range(2, 20))]
    assert_refused(lambda: tokenizer_json(tokens, "a/tokenizer.model"), ["a/tokenizer.model", "ways"])


def test_the_file_is_json_of_the_library(tmp_path: Path) -> None:
    content = json.loads(tokenizer_json(read_ranks(write_ranks(tmp_path / "tokenizer.model", 300))))
    assert len(content["model"]["vocab"]) == 300
    assert len(content["added_tokens"]) == 2048
