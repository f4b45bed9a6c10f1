"""What is fed, what is timed, and what counts; by a clock of the test's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from l4convert.bench.sweep import Sweep, counted, sweep
from l4convert.checkpoint.presets import SCOUT
from l4convert.progress import NO_PROGRESS
from l4convert.runtime.runner import IntArray

CONFIG = dataclasses.replace(SCOUT, attention_chunk_size=8, vocab_size=50, max_position_embeddings=100)


class Clockwork:
    """A source whose sequences take 1 s for each token of a step, and 10 s for a step of one token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sequences: list[Sequence] = []

    def fresh(self) -> Sequence:
        return self.filled(0)

    def filled(self, length: int) -> Sequence:
        self.sequences.append(Sequence(self, length))
        return self.sequences[-1]


class Sequence:
    def __init__(self, clockwork: Clockwork, length: int) -> None:
        self._clockwork = clockwork
        self.length, self.begun = length, length
        self.steps: list[int] = []
        self.ids: list[int] = []

    def feed(self, ids: IntArray) -> None:
        assert 0 <= ids.min() <= ids.max() < CONFIG.vocab_size
        self.steps.append(ids.shape[1])
        self.ids += ids[0].tolist()
        self.length += ids.shape[1]
        self._clockwork.now += ids.shape[1] if ids.shape[1] > 1 else 10

    def cache_bytes(self) -> Mapping[str, int]:
        return {"global": self.length, "chunked": min(self.length, 8)}


def measured(**changes: Any) -> tuple[Clockwork, list[Any]]:
    clockwork = Clockwork()
    plan = dataclasses.replace(Sweep(CONFIG, (16, 40), 4, False), **changes)
    with NO_PROGRESS.task("") as task:
        points = sweep(clockwork, plan, lambda length: {"global": length, "chunked": 0}, task, lambda: clockwork.now)
    return clockwork, points


def test_the_context_is_reached_in_steps_that_end_at_chunks() -> None:
    clockwork, points = measured()
    warm_up, sequence = clockwork.sequences
    assert warm_up.steps == [8, 1]
    assert sequence.steps == [8, 4, 1, 1, 1, 1, 8, 8, 4, 1, 1, 1, 1]
    assert [point.context for point in points] == [16, 40]
    first, last = (point.prefill for point in points)
    assert (first.tokens, first.seconds, first.last_tokens, first.last_seconds) == (12, 12, 12, 12)
    assert (last.tokens, last.seconds, last.last_tokens, last.last_seconds) == (32, 32, 20, 20)
    assert [point.decode_ms for point in points] == [(10_000,) * 3] * 2  # a quarter is warm-up
    assert [point.cache_bytes["global"] for point in points] == [15, 39]
    assert [point.cache_used_bytes["global"] for point in points] == [15, 39]


def test_synthetic_contexts_are_begun_anew() -> None:
    clockwork, points = measured(synthetic=True)
    assert [(s.begun, s.length) for s in clockwork.sequences[1:]] == [(12, 16), (36, 40)]
    assert all(point.prefill is None for point in points)


def test_every_runner_gets_the_same_tokens() -> None:
    first, second = measured()[0], measured()[0]
    assert first.sequences[1].ids == second.sequences[1].ids
    assert len(set(first.sequences[1].ids)) > 10


@pytest.mark.parametrize(("steps", "left"), [(1, 1), (2, 2), (4, 3), (32, 24)])
def test_warm_up_leaves_something(steps: int, left: int) -> None:
    assert len(counted([0.0] * steps)) == left
