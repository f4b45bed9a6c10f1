from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.parity.by_length import ByLength, TextComparison, length_edges
from l4convert.parity.metrics import Comparison, measure

RANDOM = np.random.default_rng(0)


def logits(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    reference, noise = RANDOM.normal(size=(2, tokens, 5)).astype(np.float32)
    return reference, reference + 0.1 * noise


@pytest.mark.parametrize(
    ("window", "edges"),
    [
        (2, (0, 2)),
        (256, (0, 256)),
        (257, (0, 256, 257)),
        (100_000, (0, 256, 1024, 4096, 16384, 65536, 100_000)),
    ],
)
def test_ranges_grow_by_four(window: int, edges: tuple[int, ...]) -> None:
    assert length_edges(window) == edges


def test_each_range_has_the_measures_of_its_own_tokens() -> None:
    reference, artifact = logits(1500)
    targets = RANDOM.integers(0, 5, 1500)
    parts = ByLength(1500)
    for block in measure(reference, artifact, targets):
        parts.add(0, block)
    rows = parts.rows()
    assert [(row.start, row.stop) for row in rows] == [(0, 256), (256, 1024), (1024, 1500)]
    for row in rows:
        part = slice(row.start, row.stop)
        expected = Comparison()
        expected.update(reference[part], artifact[part], targets[part])
        assert row.metrics == expected.result()


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_pieces_of_any_size_add_up(sizes: list[int]) -> None:
    reference, artifact = logits(sum(sizes))
    whole, pieces = TextComparison(sum(sizes)), TextComparison(sum(sizes))
    whole.add(0, measure(reference, artifact))
    at = 0
    for size in sizes:
        part = slice(at, at + size)
        pieces.add(at, measure(reference[part], artifact[part]))
        at += size
    for one, other in zip(whole.by_length.rows(), pieces.by_length.rows(), strict=True):
        assert one.to_json() == pytest.approx(other.to_json(), nan_ok=True)
    assert sum(row.metrics.tokens for row in pieces.by_length.rows()) == pieces.whole.result().tokens == sum(sizes)


def test_blocks_and_windows_keep_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4convert.parity.metrics._BLOCK_ELEMENTS", 35)  # seven tokens
    text = TextComparison(300)
    reference, artifact = logits(300)
    text.add(0, measure(reference, artifact))
    text.add(0, measure(reference[:100], artifact[:100]))
    assert [row.metrics.tokens for row in text.by_length.rows()] == [356, 44]


def test_a_range_of_nothing_but_nan_is_shown() -> None:
    reference, artifact = logits(300)
    artifact[256:] = np.nan
    text = TextComparison(300)
    text.add(0, measure(reference, artifact))
    last = text.by_length.rows()[-1]
    assert last.metrics.problems()
    assert json.loads(json.dumps(last.to_json(), allow_nan=False)) == {
        **dict.fromkeys(dataclasses.asdict(last.metrics) | {"ppl_ratio": 0}),
        "from": 256,
        "to": 300,
        "tokens": 0,
        "scored": 0,
        "non_finite": 44,
        "non_finite_reference": 0,
    }


def test_ranges_without_tokens_are_left_out() -> None:
    text = TextComparison(5000)
    text.add(300, measure(*logits(10)))
    assert [(row.start, row.stop) for row in text.by_length.rows()] == [(256, 1024)]
