"""Expected memory against what tracemalloc counts while the same tiles are computed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import groupby, islice

import pytest

from l4convert.emit.fill import Filling
from l4convert.emit.jobs import group_jobs
from l4convert.emit.memory import share_memory
from l4convert.emit.plan import PlannedTensor
from l4convert.errors import UsageError
from l4convert.planning import memory
from l4convert.planning.memory import plan_memory, tile_bytes
from tests.planning.conversions import sample

GIB = 1 << 30


def measured(group: Sequence[PlannedTensor]) -> int:
    """Peak of what is allocated while the first two jobs of a group are computed."""
    tracemalloc.start()
    try:
        for job in islice(group_jobs(group, 0), 2):
            for piece in job.pieces:
                data = piece.compute()  # held, as by the fill, until the next piece is there
                assert len(data) == piece.nbytes
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("recipe", "target"),
    [("none", "cpu"), ("int4", "cpu"), ("fp8", "portable"), ("int4", "tensorrt"), ("fp8", "tensorrt")],
)
def test_the_largest_tile_is_an_upper_bound_and_no_wild_one(recipe: str, target: str):
    plan, parsed = sample(recipe, target)
    expected = plan_memory(plan, parsed, Filling(jobs=1), GIB)
    ordered = sorted(plan.groups, key=lambda group: tile_bytes(group, parsed))
    by_dtype = {d: list(g)[-1] for d, g in groupby(ordered, key=lambda group: group[0].tensor.dtype)}
    peaks = [(measured(group), next(group_jobs(group, 0)).memory) for group in by_dtype.values()]
    peak = max(peak for peak, _ in peaks)
    assert 0.99 * peak <= expected.tile <= 2 * peak
    assert all(peak <= allowed for peak, allowed in peaks)  # what the memory limit counts for a running job


def test_a_tile_does_not_grow_with_the_model():
    scout, maverick = (plan_memory(*sample("int4", "cpu", preset), Filling(1), GIB) for preset in ("scout", "maverick"))
    assert maverick.tile == pytest.approx(scout.tile, rel=0.1)
    assert maverick.peak == maverick.process + maverick.tile + maverick.pages
    assert maverick.rows > 0


def test_jobs_that_run_at_once_are_counted_as_far_as_the_limit_lets_them(monkeypatch):
    monkeypatch.setattr(memory, "share_memory", lambda limit, largest: share_memory(limit + held, largest))
    held = memory.resident_bytes()
    plan, recipe = sample("int4", "cpu")
    largest = max(next(group_jobs(group, 0)).memory for group in plan.groups)
    free = plan_memory(plan, recipe, Filling(jobs=5, memory_limit=4 * GIB), 5 << 20)
    assert (free.jobs, free.peak) == (5, free.process + 5 * free.tile + (5 << 20))
    assert plan_memory(plan, recipe, Filling(jobs=5, memory_limit=3 * largest), GIB).jobs == 2  # a quarter is for pages
    assert (
        plan_memory(plan, recipe, Filling(jobs=10**9, memory_limit=10**6 * GIB), GIB).jobs < 10**5
    )  # no more than exist


def test_a_limit_that_was_asked_for_is_refused_as_convert_does_and_the_default_is_not(monkeypatch):
    plan, recipe = sample("int4", "cpu")
    with pytest.raises(UsageError, match="too small for this model: the least is"):
        plan_memory(plan, recipe, Filling(memory_limit=1 << 20), GIB)
    monkeypatch.setattr(memory, "default_limit", lambda: 1 << 20)
    assert plan_memory(plan, recipe, Filling(jobs=4), GIB).jobs == 1
