"""The experiment on rotary positions: its reference, its positions, and what it finds at the far end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.scripts import load

positions = load("positions")
LAST = {"scout": 10_485_759, "maverick": 1_048_575}


@pytest.mark.parametrize("model", LAST)
def test_the_reference_s_frequencies_are_those_of_transformers(model: str) -> None:
    """To the float32 that transformers has them in."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    config = positions.MODELS[model]
    theirs = Llama4TextRotaryEmbedding(Llama4TextConfig(**positions.text_config(config))).inv_freq.numpy()
    np.testing.assert_allclose(positions.frequencies(config), theirs, rtol=3e-6)


@pytest.mark.parametrize("model", LAST)
def test_both_sides_of_boundaries_up_to_the_last_position(model: str) -> None:
    found = positions.positions(positions.MODELS[model])
    assert (found[0], found[-1]) == (1000, LAST[model])
    assert {8191, 8192, 8193, 1_048_575} <= set(found)
    assert (8_388_609 in found) == (model == "scout")


def test_at_the_last_position_one_form_is_exact_and_the_other_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "positions", lambda config: [1000, LAST["scout"]])
    rows = {(row.form, row.position): row for row in positions.measured("scout", positions.SCOUT, 64)}
    near, far = (rows["chunk-relative", p] for p in (1000, LAST["scout"]))
    assert max(near.score_max, far.score_max, near.angle_max, far.angle_max) < 1e-7
    assert max(near.attention_max, far.attention_max) < 1e-6
    absolute = rows["absolute", LAST["scout"]]
    assert absolute.angle_max > 0.1
    assert absolute.score_max > 1e-3
    assert rows["absolute", 1000].score_max < 1e-4


def test_the_table_the_json_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    short = dataclasses.replace(positions.SCOUT, attention_chunk_size=64)
    monkeypatch.setattr(positions, "MODELS", {"scout": short, "maverick": short})
    monkeypatch.setattr(positions, "positions", lambda config: [1000, 1024, 100_000])
    files = [tmp_path / "positions.json", tmp_path / "positions.svg"]
    assert positions.main(["--json", str(files[0]), "--plot", str(files[1]), "--pairs", "8"]) == 0
    content = json.loads(files[0].read_text())
    assert content["schema"] == "l4convert.positions/1"
    assert len(content["rows"]) == 2 * 3 * 2
    assert "Largest error" in files[1].read_text()
