"""optimum-onnx's ORTModelForCausalLM loads the artifact as it is and generates what we and transformers do."""

from __future__ import annotations

import pytest

from tests.interop.artifacts import NEW_TOKENS, crosses_chunk, reference_shortfall
from tests.interop.conftest import MakeCase
from tests.interop.environments import run_client


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_greedy_text_is_ours(case: MakeCase, recipe: str) -> None:
    made = case(recipe, "growing")
    assert crosses_chunk(made)
    request = {
        "model": str(made.artifact),
        "batches": [[made.prompts[0]], made.prompts],
        "new_tokens": NEW_TOKENS,
        "pad": made.pad,
    }
    answer = run_client("optimum", request)
    alone, together = answer["outputs"]
    assert answer["config"] == "Llama4TextConfig"
    assert alone[0] == made.greedy[0]
    assert [row[: len(ours)] for row, ours in zip(together, made.greedy, strict=True)] == made.greedy


def test_greedy_text_is_the_references(case: MakeCase) -> None:
    made = case("none", "growing")
    assert len(made.greedy[0]) == NEW_TOKENS
    for prompt, continuation in zip(made.prompts, made.greedy, strict=True):
        assert reference_shortfall(made.checkpoint, prompt, continuation) <= 1e-4
