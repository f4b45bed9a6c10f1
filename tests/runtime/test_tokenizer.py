from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from l4convert.errors import InputError
from l4convert.runtime.tokenizer import TextTokenizer
from tests.runtime.byte_tokenizer import BOS, EOS, NOTHING, SEQUENCE, TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.open(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("post_processor", [None, TEMPLATE, SEQUENCE, NOTHING], ids=["none", "bos", "sequence", "bare"])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
def test_tokens_are_those_of_autotokenizer(tmp_path: Path, post_processor: Any, config: dict[str, Any]) -> None:
    folder = write_tokenizer(tmp_path, post_processor, **config)
    theirs, ours = AutoTokenizer.from_pretrained(folder), TextTokenizer.open(folder)
    for text in ("the dog", "", f"a{EOS}b", "naïve 犬"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_tiny_scout_tokens_are_those_of_autotokenizer(tiny_scout: Path) -> None:
    text = (tiny_scout / "heldout.txt").read_text(encoding="utf-8")[:4000]
    theirs, ours = AutoTokenizer.from_pretrained(tiny_scout), TextTokenizer.open(tiny_scout)
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


@given(text=st.text())
def test_streamed_text_is_the_text(plain: TextTokenizer, text: str) -> None:
    stream = plain.stream()
    pieces = [stream.push(token) for token in plain.encode(text)]
    assert "".join([*pieces, stream.finish()]) == text


@given(tokens=st.lists(st.integers(0, 299), max_size=40))
def test_streaming_any_tokens_gives_what_decoding_them_at_once_gives(plain: TextTokenizer, tokens: list[int]) -> None:
    stream = plain.stream()
    assert "".join([stream.push(token) for token in tokens] + [stream.finish()]) == plain.decode(tokens)


def test_a_character_of_several_tokens_comes_out_once_and_whole(plain: TextTokenizer) -> None:
    stream = plain.stream()
    tokens = plain.encode("x犬y", special=False)
    assert len(tokens) == 5
    assert [stream.push(token) for token in tokens] == ["x", "", "", "犬", "y"]
    assert stream.finish() == ""


def test_a_text_that_ends_inside_a_character_ends_with_a_replacement(plain: TextTokenizer) -> None:
    stream = plain.stream()
    assert [stream.push(token) for token in plain.encode("x犬", special=False)[:-1]] == ["x", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_not_printed(plain: TextTokenizer) -> None:
    assert plain.decode(plain.encode(f"{BOS}the dog{EOS}")) == "the dog"


def test_truncation_and_padding_saved_by_a_training_script_are_ignored(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    expected = TextTokenizer.open(folder).encode("the quick brown fox jumps")
    backend.save(str(folder / "tokenizer.json"))
    assert TextTokenizer.open(folder).encode("the quick brown fox jumps") == expected
    assert 3 < len(expected) < 64


def test_absent_and_damaged_tokenizers_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file") as caught:
        TextTokenizer.open(tmp_path)
    assert caught.value.hint is not None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer.open(tmp_path)


def test_a_post_processor_that_rewrites_the_text_is_refused(tmp_path: Path) -> None:
    only_bos = processors.TemplateProcessing(single=BOS, special_tokens=[(BOS, 0)])
    with pytest.raises(InputError, match="post-processor"):
        TextTokenizer.open(write_tokenizer(tmp_path, only_bos))


def test_a_text_that_is_not_utf8_is_an_input_error(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="not UTF-8"):
        TextTokenizer.open(tmp_path).encode("a\udcffb")
