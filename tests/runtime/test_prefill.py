"""Prompts go in by steps that end at chunk boundaries and keep scores and logits under the budget."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.presets import SCOUT
from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession, prefill, prefill_steps, step_limit
from l4convert.runtime.prefill import BUDGET
from tests.artifacts import KV_CACHES
from tests.runtime.following import Logits, text


@given(
    start=st.integers(0, 10_000_000),
    tokens=st.integers(1, 60_000),
    chunk=st.sampled_from([1, 7, 8192]),
    limit=st.integers(50, 9000),
)
def test_steps_feed_everything_and_cross_no_boundary(start: int, tokens: int, chunk: int, limit: int) -> None:
    at = start
    for size in prefill_steps(start, tokens, chunk, limit):
        assert 0 < size <= limit
        assert at // chunk == (at + size - 1) // chunk
        at += size
    assert at == start + tokens


@pytest.mark.parametrize("context", [1, 10_000, 1_000_000, 10_485_760])
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_and_logits_of_a_step_stay_under_the_budget(context: int, batch: int) -> None:
    size = step_limit(SCOUT, context, batch)
    scores, logits = batch * SCOUT.num_attention_heads * size * context * 4, batch * size * SCOUT.vocab_size * 4
    assert size == 1 or max(scores, logits) <= BUDGET
    larger = size + 1
    assert batch * 4 * larger * max(SCOUT.num_attention_heads * context, SCOUT.vocab_size) > BUDGET


def test_steps_of_a_million_tokens_of_scout_shrink_as_the_context_grows() -> None:
    sizes = list(prefill_steps(0, 1_000_000, 8192, lambda context: step_limit(SCOUT, context)))
    contexts = np.cumsum(sizes)
    assert contexts[-1] == 1_000_000
    assert (40 * np.array(sizes) * contexts * 4 <= BUDGET).all()
    assert sizes[0] == 409 == BUDGET // (40 * 8192 * 4)
    assert max(sizes[-20:]) == 3 == BUDGET // (40 * 1_000_000 * 4)


@pytest.mark.parametrize(
    ("kv_cache", "target", "rows", "blocks"),
    [
        ("static", "cpu", 1, True),
        ("static", "cpu", 2, False),
        ("static", "portable", 1, False),
        ("growing", "cpu", 1, False),
        ("windowed", "cpu", 1, False),
    ],
)
def test_only_where_the_kernel_works_in_blocks_scores_do_not_count(
    kv_cache: str, target: str, rows: int, blocks: bool, scout_layout: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    convert(ConvertOptions(scout_layout, out, target=target, recipe="none", kv_cache=kv_cache))
    with OrtSession.open(out) as session:
        limit = session.start(rows).step_limit(50_000_000)
        assert limit == step_limit(session.config, 50_000_000, rows, scores=not blocks)
    assert (limit > 1000) == blocks


class OnlySteps(NamedTuple):
    """A stream that does not say how many tokens it takes."""

    step: Callable[..., np.ndarray]


class Recorder:
    """Progress that only counts."""

    def __init__(self) -> None:
        self.total: float | None = None
        self.done: list[float] = []

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "B"):  # type: ignore[no-untyped-def]
        assert (description, unit) == ("Reading the prompt", "tokens")
        self.total = total
        yield self

    def advance(self, amount: float) -> None:
        self.done.append(amount)

    def update(self, description: str) -> None: ...


@pytest.mark.parametrize("form", KV_CACHES)
def test_a_prompt_in_small_steps_gives_the_logits_of_transformers(
    form: str, artifacts: dict[str, Path], reference: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget so small that steps become shorter within the prompt; two rows, on top of what was there."""
    monkeypatch.setattr(importlib.import_module("l4convert.runtime.prefill"), "BUDGET", 6000)
    rows, progress = np.stack([text(33), text(33, seed=2)]), Recorder()
    session = OrtSession.open(artifacts[form], max_length=40, threads=1)
    config = replace(session.config, vocab_size=16)  # so that scores decide
    stream = session.start(2)
    stream.step(rows[:, :3])
    logits = prefill(OnlySteps(stream.step), rows[:, 3:], config, progress, start=3)
    assert progress.total == sum(progress.done) == 30
    assert progress.done == [5, 8, 7, 1, 5, 3, 1]
    assert progress.done[-1] < max(progress.done)
    expected = reference(rows.tolist())
    for row in range(2):
        assert np.abs(logits[row] - expected[row][-1]).max() <= 1e-4 * np.abs(expected[row]).max()
