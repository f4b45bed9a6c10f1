"""Windows that are too long for one call. What is too long is made small here, so that it takes no time."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint import open_checkpoint
from l4convert.parity import ParityReport, compare, default_policy, validate
from l4convert.parity.feeding import Piece, feed
from l4convert.parity.lockstep import Pieces
from l4convert.parity.outcome import TextUsed
from l4convert.parity.splits import Call, Split, batch_splits, joined, long_splits, row_of, steps
from l4convert.parity.steps import is_long, longest_at_once, reference_limit, reference_steps
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.runtime import ArtifactInfo
from tests.artifacts import KV_CACHES, write_canonical_artifact
from tests.parity.fakes import VOCABULARY, Counter, Fake, FakeText
from tests.parity.test_validate import (
    crossing_calls_are_wrong,
    nan_in_third_chunk,
    rows_leak,
    small_error,
    wrong_after_short_calls,
)
from tests.shapes import SCOUT

ROWS = ["steps", "odd splits", "token by token", "batch, left padding", "batch, right padding"]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long is what has over 20 tokens of 128 logits; steps of the artifact have 12 tokens, of the reference 16."""
    monkeypatch.setattr("l4convert.parity.steps.AT_ONCE", 20 * VOCABULARY)
    monkeypatch.setattr("l4convert.parity.steps.STEP_BYTES", 16 * 4 * 2 * 4 * 64)  # 4 experts of 64
    # The package has a function of the module's name.
    monkeypatch.setattr(import_module("l4convert.runtime.prefill"), "BUDGET", 12 * VOCABULARY * 4)


@pytest.fixture
def info(scout_layout: Path) -> ArtifactInfo:
    """Vocabulary 128, chunks of 8."""
    config = open_checkpoint(scout_layout).config
    return ArtifactInfo(scout_layout, "growing", "none", frozenset(), "portable", config, "float32", "any")


def run(
    info: ArtifactInfo,
    fault: Callable[..., None] | None = None,
    reference: Fake | None = None,
    progress: Progress = NO_PROGRESS,
    **options: object,
) -> ParityReport:
    random = np.random.default_rng(3)
    windows = [random.integers(0, 128, length) for length in (60, 60, 44)]
    used = TextUsed("test", random=False, tokens=164, windows=3, window=60)
    policy = default_policy("none", (), "portable")
    return compare(
        Fake(fault), reference or Fake(), windows, info=info, used=used, policy=policy, progress=progress, **options
    )


@pytest.mark.usefixtures("small_steps")
def test_steps_measure_what_one_call_measures(info: ArtifactInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = run(info, small_error)
    with monkeypatch.context() as patch:
        patch.setattr("l4convert.parity.steps.AT_ONCE", 1 << 28)
        at_once = run(info, small_error)
    assert [row.name for row in stepped.rows] == ROWS
    assert at_once.rows[0].name == "one call"
    assert stepped.whole.to_json() == pytest.approx(at_once.whole.to_json())
    assert stepped.rows[0].boundaries == at_once.rows[0].boundaries
    assert [row.to_json() for row in stepped.by_length] == [pytest.approx(row.to_json()) for row in at_once.by_length]
    for row in stepped.rows[3:]:  # batches are the same texts
        (other,) = (one for one in at_once.rows if one.name == row.name)
        assert row.metrics.to_json() == pytest.approx(other.metrics.to_json())


@pytest.mark.usefixtures("small_steps")
def test_the_reference_is_fed_every_token_once_and_few_at_a_time(
    info: ArtifactInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    whole = FakeText.step
    monkeypatch.setattr(FakeText, "step", lambda self, ids: sizes.append(len(ids)) or whole(self, ids))
    report = run(info)
    assert report.passed, report.failures
    batch = next(row for row in report.rows if row.name.startswith("batch"))
    assert sum(sizes) == 164 + batch.metrics.tokens
    assert max(sizes) <= 16
    assert sizes[:4] == [16, 16, 16, 12], "whole chunks, where they fit"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (small_error, set(ROWS)),
        (nan_in_third_chunk, {"odd splits", "token by token", "batch, left padding", "batch, right padding"}),
        (wrong_after_short_calls, {"odd splits", "token by token", "batch, left padding", "batch, right padding"}),
        (rows_leak, {"batch, left padding", "batch, right padding"}),
        # What batches are held against is each text alone, in parts of the batch's sizes, which cross boundaries too.
        (crossing_calls_are_wrong, {"odd splits", "batch, left padding", "batch, right padding"}),
    ],
)
@pytest.mark.usefixtures("small_steps")
def test_faults_are_found_in_the_rows_that_show_them(
    fault: Callable[..., None], expected: set[str], info: ArtifactInfo
) -> None:
    report = run(info, fault)
    failed = {row.name for row in report.rows if not row.passed}
    assert failed
    assert failed <= expected
    assert all("one call" not in reason for reason in report.failures)


@pytest.mark.usefixtures("small_steps")
def test_what_has_one_stream_at_a_time_is_split_on_the_beginning(info: ArtifactInfo) -> None:
    report = run(info, one_stream=True)
    assert report.passed, report.failures
    assert [row.name for row in report.rows[:2]] == ["steps", "odd splits"]
    assert report.whole.tokens == 164
    assert report.rows[1].metrics.tokens == longest_at_once(info.config)
    assert any("one stream at a time" in note for note in report.notes)
    assert any("in steps of at most 16 tokens" in note for note in report.notes)


@pytest.mark.parametrize("one_stream", [False, True])
@pytest.mark.usefixtures("small_steps")
def test_progress_ends_at_its_total(one_stream: bool, info: ArtifactInfo) -> None:
    counter = Counter()
    run(info, progress=counter, one_stream=one_stream)
    assert counter.done == counter.total > 0


@pytest.mark.parametrize("form", KV_CACHES)
@pytest.mark.usefixtures("small_steps")
def test_an_artifact_equals_transformers_in_steps(form: str, scout_layout: Path, tmp_path: Path) -> None:
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact", form)
    report = validate(artifact, scout_layout, window=70, tokens=100)
    assert report.passed, report.failures
    assert [row.name for row in report.rows] == ROWS
    assert max(row.metrics.max_rel_logit for row in report.rows) < 1e-5
    assert any("said to be there" in note and "position 64" in note for note in report.notes)


@given(st.integers(30, 3000), st.integers(1, 600), st.integers(1, 200))
def test_long_splits_feed_every_token_once_and_few_at_a_time(length: int, chunk: int, limit: int) -> None:
    base = steps(length, chunk, lambda _: limit)
    for split in (base, *long_splits(length, chunk, limit)):
        assert split.lengths == (length,)
        assert all(0 < call.counts[0] <= limit for call in split.calls)
    at = 0
    for call in base.calls:
        assert at // chunk == (at + call.counts[0] - 1) // chunk, "a step crosses a boundary"
        at += call.counts[0]


@given(st.integers(12, 3000), st.integers(1, 600), st.integers(1, 200))
def test_batches_in_parts_are_the_same_batches(length: int, chunk: int, limit: int) -> None:
    for whole, parts in zip(batch_splits(length, chunk), batch_splits(length, chunk, limit), strict=True):
        assert whole.lengths == parts.lengths
        assert all(max(call.counts) <= limit for call in parts.calls)
        frames = joined(parts, limit)
        assert frames.lengths == parts.lengths
        assert all(max(call.counts) <= limit for call in frames.calls)
        assert [row_of(frames, row).lengths for row in range(3)] == [(tokens,) for tokens in parts.lengths]


def test_pieces_are_cut_at_the_stops_and_nothing_is_fed_early() -> None:
    texts = [np.arange(10), np.arange(20, 26)]
    split = Split("ragged", "", tuple(Call(counts) for counts in ((4, 1), (1, 3), (5, 2))))
    fed: list[Piece] = []
    whole = feed(Fake(), texts, split)
    pieces = Pieces((fed.append(piece) or piece for piece in whole), 2)
    got = [
        [(one.row, one.start, len(one.logits)) for one in pieces.until(stops)] for stops in ([3, 2], [6, 2], [10, 6])
    ]
    assert got == [
        [(0, 0, 3), (1, 0, 1), (1, 1, 1)],
        [(0, 3, 1), (0, 4, 1), (0, 5, 1)],
        [(0, 6, 4), (1, 2, 2), (1, 4, 2)],
    ]
    assert len(fed) == 6


def test_scouts_bounds_are_those_of_the_documentation() -> None:
    assert longest_at_once(SCOUT) == 1328
    assert not is_long(1328, SCOUT)
    assert is_long(1329, SCOUT)
    assert sum(reference_steps(100_000, SCOUT)) == 100_000
    assert max(reference_steps(100_000, SCOUT)) == reference_limit(SCOUT, 100_000) == 256
    assert reference_limit(SCOUT, 10_000_000) >= 1
