"""Checkpoints whose weights are stored quantized, through every command: from the folder to the verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from l4convert import cli
from tests.checkpoints import MAVERICK, write_random_checkpoint
from tests.compressed import W4A16, compress


def run_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict[str, Any]:
    assert cli.run([*map(str, args), "--json"]) == code
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


PLAIN = ("re:.*lm_head", "re:.*router", "re:vision_model.*", "re:multi_modal_projector.*")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # changes of the model, changes of the scheme, recipe, what the pass says of the experts
    "Scout W4A16": ({}, {}, "int4", "carried over"),
    "Maverick W4A16, kept": (dict(MAVERICK), {}, "keep", "carried over"),
    "multimodal, zero points": ({"conditional": True}, {"symmetric": False}, "none", "kept dequantized"),
    "8 bits and biases": ({"attention_bias": True}, {"num_bits": 8}, "keep", "kept dequantized"),
}


@pytest.mark.parametrize(("model", "scheme", "recipe", "remark"), CASES.values(), ids=CASES.keys())
def test_from_inspect_to_verify(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: Mapping[str, Any],
    scheme: Mapping[str, Any],
    recipe: str,
    remark: str,
) -> None:
    """The reference has the weights that the library decompressed, and the artifact computes the same but for rounding:
    the limits are those of weights that nobody rounded."""
    source = write_random_checkpoint(tmp_path / "source", num_hidden_layers=2, num_local_experts=2, **model)
    checkpoint = compress(source, tmp_path / "checkpoint", {**W4A16, **scheme}, ignore=PLAIN, shards=2)

    found = run_json(capsys, "inspect", checkpoint)
    assert found["quantization"].startswith("compressed-tensors: INT")
    assert found["bytes"] < 0.75 * run_json(capsys, "inspect", source)["bytes"]

    plan = run_json(capsys, "plan", checkpoint, "--recipe", recipe)
    notes = {row["name"]: [note["remark"] for note in row["notes"]] for row in plan["passes"]}
    assert notes["quantize_weights"]
    assert all(remark in note for note in notes["quantize_weights"])

    out = tmp_path / "out"
    done = run_json(capsys, "convert", checkpoint, "--output", out, "--recipe", recipe)
    assert done["bytes"] == plan["bytes"]
    manifest = json.loads((out / "l4convert.json").read_text())
    assert manifest["source"]["quantization"] == found["quantization"]

    report = run_json(capsys, "validate", out, "--reference", checkpoint, "--tokens", 200, "--window", 40)
    assert report["policy"]["name"] == "default for none"
    assert report["passed"]
    assert max(row["reference"]["max_rel_logit"] for row in report["rows"]) < 1e-4
    run_json(capsys, "verify", out)


def test_a_second_rounding_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_random_checkpoint(tmp_path / "source", num_hidden_layers=1, num_local_experts=2)
    checkpoint = compress(source, tmp_path / "checkpoint")
    out = tmp_path / "out"
    assert cli.run(["convert", str(checkpoint), "--output", str(out), "--recipe", "fp8"]) == 0
    told = capsys.readouterr().out
    assert (
        "quantize_weights: 5 weights stored as INT4 in groups of 32, rounded a second time, to fp8;"
        " --recipe keep would carry its codes over"
    ) in told
    (report,) = [
        p for p in json.loads((out / "l4convert.json").read_text())["passes"] if p["name"] == "quantize_weights"
    ]
    assert list(report["notes"].values()) == [5]


def test_a_block_size_larger_than_the_groups_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_random_checkpoint(tmp_path / "source", num_hidden_layers=1, num_local_experts=2)
    checkpoint = compress(source, tmp_path / "checkpoint")
    command = ["convert", checkpoint, "--output", tmp_path / "out", "--block-size", "64"]
    assert cli.run([*map(str, command)]) == 2
    told = capsys.readouterr().err
    assert "blocks of 64 cannot be made of the groups of 32" in told
    assert not (tmp_path / "out").exists()
