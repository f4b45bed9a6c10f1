"""Expected memory against what tracemalloc counts while the same tiles are computed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import groupby

import pytest

from l4convert.emit.plan import PlannedTensor, group_chunks
from l4convert.planning.memory import plan_memory, tile_bytes
from tests.planning.conversions import sample


def measured(group: Sequence[PlannedTensor]) -> int:
    """Peak of what is allocated while the first two steps of a group are computed."""
    tracemalloc.start()
    try:
        steps = 0
        for planned, _, _ in group_chunks(group):
            steps += planned is group[-1]
            if steps == 2:
                break
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("recipe", "target"), [("none", "cpu"), ("int4", "cpu"), ("fp8", "portable")])
def test_the_largest_tile_is_an_upper_bound_and_no_wild_one(recipe: str, target: str):
    plan, parsed = sample(recipe, target)
    expected = plan_memory(plan, parsed)
    ordered = sorted(plan.groups, key=lambda group: tile_bytes(group, parsed))
    by_dtype = {d: list(g)[-1] for d, g in groupby(ordered, key=lambda group: group[0].tensor.dtype)}
    peak = max(measured(group) for group in by_dtype.values())
    assert 0.99 * peak <= expected.tile <= 2 * peak


def test_a_tile_does_not_grow_with_the_model():
    scout, maverick = (plan_memory(*sample("int4", "cpu", preset)) for preset in ("scout", "maverick"))
    assert maverick.tile == pytest.approx(scout.tile, rel=0.1)
    assert maverick.peak == maverick.process + maverick.tile
    assert maverick.rows > 0
