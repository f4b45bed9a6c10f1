"""The whole way of a checkpoint through the command line: convert, validate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4convert import cli

#: Relative error of the largest logit where nothing is rounded but float32 sums.
EXACT = 1e-4
#: The same where activations are rounded to three bits of mantissa.
ROUNDED = 0.3


def convert_and_validate(
    checkpoint: Path, out: Path, recipe: str, capsys: pytest.CaptureFixture[str], limit: float = EXACT
) -> dict[str, Any]:
    """Convert under a recipe and compare with the reference; every split must be within ``limit``.

    Returns:
        What ``convert --json`` says.
    """
    capsys.readouterr()
    assert cli.run(["convert", str(checkpoint), "--output", str(out), "--recipe", recipe, "--json"]) == 0
    converted: dict[str, Any] = json.loads(capsys.readouterr().out)
    command = ["validate", str(out), "--reference", str(checkpoint), "--tokens", "100", "--window", "50", "--json"]
    code = cli.run(command)
    told = capsys.readouterr()
    assert code == 0, told.err
    report = json.loads(told.out)
    assert report["passed"]
    assert max(row["reference"]["max_rel_logit"] for row in report["rows"]) < limit
    return converted


def remarks(converted: dict[str, Any]) -> set[str]:
    """What the pass says became of weights that were stored quantized, without their kinds."""
    (report,) = [report for report in converted["passes"] if report["name"] == "quantize_weights"]
    return {note["remark"].partition(":")[0].partition(", ")[2] or "carried over" for note in report["notes"]}
