"""A stream over more than 50 chunk boundaries: the acceptance run of 100,000 tokens, of a model that takes no time."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.benchmarks.scripts import load, run_script
from tests.checkpoints import write_random_checkpoint

TOKENS, CHUNK = 1640, 32


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("long")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0,
            "high_freq_factor": 1.0, "original_max_position_embeddings": 64}  # fmt: skip
    checkpoint = write_random_checkpoint(
        folder / "checkpoint", attention_chunk_size=CHUNK, floor_scale=64, rope_parameters=rope
    )
    sizes = ["--tokens", TOKENS, "--kv-cache", "static", "windowed", "--scratch", folder, "--json", folder / "out.json"]
    done = run_script("long_stream.py", checkpoint, *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| static |") == 3
    return json.loads((folder / "out.json").read_text())


def test_a_long_stream_equals_transformers_in_any_split(result: dict) -> None:
    assert result["tokens"] == TOKENS
    assert len(result["boundaries"]) == 50
    assert result["positions"] > 1000
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        for against in row["against"].values():
            assert against["max_rel_logit"] < 1e-4
            assert against["over_bound"] == 0


def test_chunked_layers_hold_one_chunk_and_global_ones_everything(result: dict) -> None:
    slot = 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32
    for row in result["rows"]:
        if row["kv_cache"] == "static":  # buffers, made once
            assert set(row["chunked_bytes"]) == {3 * CHUNK * slot}
            assert set(row["global_bytes"]) == {TOKENS * slot}
        else:
            assert max(row["chunked_bytes"]) <= 3 * CHUNK * slot
            assert row["global_bytes"] == [tokens * slot for tokens in row["tokens"]]


def test_samples_are_on_both_sides_of_boundaries_all_along() -> None:
    script = load("long_stream")
    marks = script.boundaries(100_000, 128)
    assert len(marks) == 50
    assert (marks[0], marks[-1]) == (128, 781 * 128)
    places = set(script.sampled(100_000, marks).tolist())
    assert all({mark - 4, mark - 1, mark, mark + 3} <= places for mark in marks.tolist())
    assert {0, 99_999} <= places
    assert max(np.diff(sorted(places))) <= 101


def test_a_stream_without_a_boundary_has_samples_too() -> None:
    script = load("long_stream")
    marks = script.boundaries(100, 128)
    assert len(marks) == 0
    assert script.sampled(100, marks).tolist() == list(range(100))
