"""optimum-onnx's ORTModelForCausalLM loads the artifact as it is and generates what we and transformers do."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession, Sampler, generate
from tests.checkpoints import write_random_checkpoint
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


def test_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """Its config.json nests the decoder's, which the client does not look for."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", conditional=True)
    artifact = tmp_path / "artifact"
    convert(ConvertOptions(checkpoint, artifact, recipe="none"))
    prompt = list(range(10, 30))
    with OrtSession.open(artifact) as session:
        ours = list(generate(session, prompt, max_new_tokens=20, sampler=Sampler(), eos_ids={2}))
    answer = run_client("optimum", {"model": str(artifact), "batches": [[prompt]], "new_tokens": 20, "pad": 0})
    assert answer == {"config": "Llama4TextConfig", "outputs": [[ours]]}
