"""Checkpoints in Meta's format through the command line: every command that takes one, and Meta's code as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4convert import cli
from tests.meta_checkpoints import (
    MAVERICK,
    SCOUT,
    VISION,
    published,
    quantize_impls,
    random_state,
    write_meta,
    write_quantized,
)
from tests.test_end_to_end import run

Capture = pytest.CaptureFixture[str]


def result(capsys: Capture, *args: object) -> dict[str, Any]:
    """What a command gives as JSON."""
    assert cli.run([*map(str, args), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, dense layers with gate and up fused, an image encoder, a tokenizer."""
    params = {**MAVERICK, "vision_args": dict(VISION)}
    state = published(random_state(params), dense="fc", norms="mlp")
    return write_meta(tmp_path_factory.mktemp("end") / "maverick", params, state, 2, tokenizer=True)


@pytest.fixture(scope="module")
def artifact(maverick: Path) -> Path:
    run("convert", maverick, "--output", maverick.parent / "out", "--recipe", "none")
    return maverick.parent / "out"


def test_an_artifact_has_metas_logits_over_chunk_boundaries(maverick: Path, artifact: Path, capsys: Capture) -> None:
    judged = result(capsys, "validate", artifact, "--reference", maverick, "--window", 41, "--tokens", 123)
    assert judged["passed"]
    assert judged["reference"].startswith("llama-models ")
    assert judged["notes"] == [
        "The text is random tokens (seed 0): equality is measured, perplexity and KL on real text are not."
    ]
    assert all(row["boundaries"] > 0 and row["reference"]["max_abs_logit"] < 1e-4 for row in judged["rows"])


def test_an_artifact_has_every_file_that_clients_need(artifact: Path, capsys: Capture) -> None:
    assert result(capsys, "verify", artifact)["ok"]
    genai = json.loads((artifact / "genai_config.json").read_text())["model"]
    assert (genai["bos_token_id"], genai["eos_token_id"], genai["pad_token_id"]) == (296, [297, 303, 304], 314)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert names <= {file.name for file in artifact.iterdir()}
    made = result(capsys, "generate", artifact, "--prompt", "the thing", "--max-new-tokens", 4, "--temperature", 0)
    assert made["prompt_tokens"] > 2


def test_inspect_and_plan_describe_a_checkpoint(maverick: Path, capsys: Capture) -> None:
    seen = result(capsys, "inspect", maverick)
    assert (seen["format"], seen["experts"], seen["config"]["num_local_experts"]) == ("meta", "stacked", 4)
    assert {"tokenizer.json", "config.json"} <= result(capsys, "plan", maverick)["files"].keys()


def test_caches_are_calibrated_with_the_tokenizer_that_is_made(maverick: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text("the thing and the other thing is in there " * 20)
    options = (
        "--kv-dtype",
        "int8",
        "--calibration",
        tmp_path / "text",
        "--calibration-tokens",
        150,
        "--target",
        "cuda",
    )
    done = result(capsys, "convert", maverick, "--output", tmp_path / "out", *options)
    assert done["calibration"]["tokens"] == 150


@pytest.mark.parametrize(("kind", "shards"), [("fp8", 1), ("int4", 2)])
def test_quantized_experts_are_carried_over_and_equal_metas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, kind: str, shards: int
) -> None:
    path = write_quantized(tmp_path / "ckpt", kind, quantize_impls(monkeypatch), shards)
    result(capsys, "convert", path, "--output", tmp_path / "out", "--recipe", "keep")
    manifest = json.loads((tmp_path / "out" / "l4convert.json").read_text())
    assert manifest["source"]["quantization"].startswith(f"Meta's {kind.upper()}")
    assert {f"{kind}_scales_0.pt", "consolidated.00.pth", "params.json"} <= manifest["source"]["files"].keys()
    options = ("--reference", path, "--window", 20, "--tokens", 120)
    assert result(capsys, "validate", tmp_path / "out", *options)["passed"]


def test_an_attack_is_one_line_and_leaves_no_output(tmp_path: Path) -> None:
    path = write_meta(tmp_path / "ckpt", {**SCOUT, "n_layers": 1})
    data = (path / "consolidated.00.pth").read_bytes()
    (path / "consolidated.00.pth").write_bytes(data.replace(b"\n_rebuild_tensor_v2\n", b"\n_rebuild_tensor_x2\n", 1))
    failed = run("convert", path, "--output", tmp_path / "out", code=3)
    assert "consolidated.00.pth" in failed.stderr
    assert "torch._utils._rebuild_tensor_x2" in failed.stderr
    assert not (tmp_path / "out").exists()
