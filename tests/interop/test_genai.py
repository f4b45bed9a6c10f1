"""ONNX Runtime GenAI loads the artifact as it is and generates what we and transformers do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4convert.runtime import TextTokenizer
from tests.interop.artifacts import NEW_TOKENS, TEXT, crosses_chunk, make_case, reference_shortfall
from tests.interop.conftest import MakeCase
from tests.interop.environments import run_client


@pytest.mark.parametrize(("recipe", "kv_cache"), [("none", "static"), ("int4", "static"), ("none", "growing")])
def test_greedy_text_is_ours(case: MakeCase, recipe: str, kv_cache: str) -> None:
    made = case(recipe, kv_cache)
    assert crosses_chunk(made)
    request = {
        "model": str(made.artifact),
        "text": TEXT,
        "batches": [[made.prompts[0]], made.prompts],
        "new_tokens": NEW_TOKENS,
        "pad": made.pad,
    }
    answer = run_client("genai", request)
    alone, together = answer["outputs"]
    assert alone[0] == made.greedy[0]
    assert [row[: len(ours)] for row, ours in zip(together, made.greedy, strict=True)] == made.greedy

    tokenizer = TextTokenizer.open(made.artifact)
    assert answer["prompt"] == tokenizer.encode(TEXT, special=False)
    assert answer["texts"][0][0] == tokenizer.decode(made.greedy[0])


@pytest.mark.parametrize(("kv_dtype", "kv_cache"), [("int8", "static"), ("int4", "growing")])
def test_quantized_caches(nano: Path, tmp_path: Path, kv_dtype: str, kv_cache: str) -> None:
    """They are tensors of another type to a client; INT4 ones of another width."""
    made = make_case(nano, tmp_path / "artifact", recipe="none", kv_cache=kv_cache, kv_dtype=kv_dtype)
    request = {
        "model": str(made.artifact),
        "text": "",
        "batches": [[prompt] for prompt in made.prompts],
        "new_tokens": NEW_TOKENS,
        "pad": made.pad,
    }
    answer = run_client("genai", request)
    assert [rows[0] for rows in answer["outputs"]] == made.greedy


def test_prompt_in_pieces(case: MakeCase) -> None:
    """Calls that end inside a chunk and cross its boundary, and GenAI's own cutting of a prompt into chunks."""
    made = case("none", "static")
    prompt, chunk = made.prompts[0], made.chunk_size
    pieces = [chunk - 5, chunk + 9]
    request = {
        "model": str(made.artifact),
        "text": "",
        "batches": [[prompt]],
        "new_tokens": NEW_TOKENS,
        "pad": made.pad,
    }
    appended = run_client("genai", {**request, "pieces": [*pieces, len(prompt) - sum(pieces)]})
    cut = run_client("genai", {**request, "search": {"chunk_size": chunk}})
    assert appended["outputs"] == cut["outputs"] == [[made.greedy[0]]]


def test_greedy_text_is_the_references(case: MakeCase) -> None:
    made = case("none", "static")
    assert len(made.greedy[0]) == NEW_TOKENS
    for prompt, continuation in zip(made.prompts, made.greedy, strict=True):
        assert reference_shortfall(made.checkpoint, prompt, continuation) <= 1e-4


def test_chunked_layers_get_one_chunk(case: MakeCase) -> None:
    """The buffers that GenAI allocates: a chunk on chunked layers, the maximum length on the others."""
    made = case("none", "static")
    config = json.loads((made.artifact / "config.json").read_text())
    request = {
        "model": str(made.artifact),
        "text": "",
        "batches": [[made.prompts[0]]],
        "new_tokens": 2,
        "pad": made.pad,
    }
    answer = run_client("genai", request)
    length = len(made.prompts[0]) + 2
    expected = [length if no_rope == 0 else made.chunk_size for no_rope in config["no_rope_layers"]]
    assert answer["buffers"] == [expected]
