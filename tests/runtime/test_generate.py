from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM

from l4convert.checkpoint.presets import SCOUT
from l4convert.errors import InputError, UsageError
from l4convert.runtime import OrtSession, Sampler, TextTokenizer, eos_token_ids, generate, generate_text
from tests.artifacts import KV_CACHES
from tests.runtime.byte_tokenizer import BOS, BOTH, EOS, TEMPLATE, write_tokenizer

PROMPT = np.random.default_rng(2).integers(3, 128, 13).tolist()


class Script:
    """A runner that always continues with the next token of a script, whatever it is fed."""

    name = "script"

    def __init__(self, tokens: list[int], vocabulary: int = 300) -> None:
        self.config = replace(SCOUT, attention_chunk_size=8, max_position_embeddings=4096, vocab_size=vocabulary)
        self.max_length = 4096
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.calls: list[list[int]] = []

    def start(self, batch: int) -> Script:
        return self

    def step(self, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        self.calls.append(input_ids[0].tolist())
        logits = np.zeros((*input_ids.shape, self.vocabulary), np.float32)
        decoded = sum(len(call) == 1 for call in self.calls[1:])
        logits[0, -1, self.tokens[decoded]] = 1
        return logits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@pytest.fixture(scope="module")
def greedy(scout_layout: Path) -> list[int]:
    """What transformers continues PROMPT with, over three chunk boundaries, without a cache."""
    model: Any = Llama4ForCausalLM.from_pretrained(scout_layout, dtype=torch.float32, attn_implementation="eager")
    output = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, use_cache=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


@pytest.mark.parametrize("form", KV_CACHES)
def test_greedy_generation_equals_transformers(form: str, artifacts: dict[str, Path], greedy: list[int]) -> None:
    with OrtSession.open(artifacts[form], max_length=len(PROMPT) + 20) as session:
        assert list(generate(session, PROMPT, max_new_tokens=20, sampler=Sampler())) == greedy


def test_long_prompts_go_in_by_steps_that_end_at_chunk_boundaries() -> None:
    runner = Script([7, 8, 9])
    assert list(generate(runner, list(range(10)), max_new_tokens=3, sampler=Sampler())) == [7, 8, 9]
    assert runner.calls == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9], [7], [8]]  # the last token is never fed


def test_prompts_that_are_too_long_are_refused_before_anything_runs() -> None:
    runner = Script([7])
    with pytest.raises(UsageError, match="4097 tokens and the model 4096 positions"):
        generate(runner, [5] * 4097, max_new_tokens=1, sampler=Sampler())
    runner.max_length = 20
    with pytest.raises(UsageError, match="21 tokens, and there is room for 20"):
        generate(runner, [5] * 21, max_new_tokens=1, sampler=Sampler())
    assert not runner.calls


def test_an_end_token_is_yielded_and_ends_the_text() -> None:
    runner = Script([7, 2, 9])
    assert list(generate(runner, [5, 5], max_new_tokens=3, sampler=Sampler(), eos_ids={2, 3})) == [7, 2]


def test_tokens_come_one_by_one() -> None:
    runner = Script([7, 8, 9])
    tokens = generate(runner, [5, 5], max_new_tokens=3, sampler=Sampler())
    assert next(tokens) == 7
    assert len(runner.calls) == 1


def test_prompts_and_counts_that_make_no_sense_are_refused_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        generate(Script([7]), [], max_new_tokens=3, sampler=Sampler())
    with pytest.raises(UsageError, match="0 new tokens"):
        generate(Script([7]), [5], max_new_tokens=0, sampler=Sampler())


def test_text_comes_in_whole_characters_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(write_tokenizer(tmp_path, TEMPLATE))
    runner = Script([*tokenizer.encode("犬 barks", special=False), tokenizer.encode(EOS, special=False)[0]])
    eos = set(tokenizer.encode(EOS, special=False))
    pieces = list(generate_text(runner, tokenizer, "the", max_new_tokens=99, sampler=Sampler(), eos_ids=eos))
    assert "".join(pieces) == "犬 barks"
    assert pieces[0] == "犬"
    assert runner.calls[0] == tokenizer.encode(f"{BOS}the", special=False)


def test_text_cut_inside_a_character_is_finished(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(write_tokenizer(tmp_path))
    runner = Script(tokenizer.encode("犬"))
    pieces = list(generate_text(runner, tokenizer, "the", max_new_tokens=2, sampler=Sampler()))
    assert pieces == ["\N{REPLACEMENT CHARACTER}"]


def test_a_tokenizer_that_ends_texts_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.open(write_tokenizer(tmp_path, BOTH))
    runner = Script([100])
    list(generate_text(runner, tokenizer, "the", max_new_tokens=1, sampler=Sampler()))
    assert runner.calls[0] == tokenizer.encode(f"{BOS}the", special=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"eos_token_id": 9}, {9}), ({"eos_token_id": [9, 4]}, {9, 4}), ({}, {2}), (None, {2})],
)
def test_end_tokens_are_those_of_the_generation_config_over_the_models(
    content: dict[str, Any] | None, expected: set[int], artifacts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "l4convert.json").write_bytes((artifacts["growing"] / "l4convert.json").read_bytes())
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}', "[]", "{"])
def test_a_damaged_generation_config_is_an_input_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        eos_token_ids(tmp_path)
