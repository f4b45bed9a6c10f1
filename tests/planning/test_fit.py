"""What fits: the largest context, the fewest GPUs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.planning.caches import Caches
from l4convert.planning.fit import Deployment
from l4convert.planning.shards import Weights
from l4convert.planning.speed import Layout


def deployment(target: str = "tensorrt", memory: int = 80 * 10**9, config: Any = SCOUT) -> Deployment:
    weights = Weights({("experts", "width"): 50 * 10**9, ("other", "nothing"): 10**9}, config.num_key_value_heads)
    return Deployment(config, target, "bfloat16", weights, memory, 1, (1, 2, 4, 8), 512)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "cuda", "cpu", "portable"])
@pytest.mark.parametrize("layout", [Layout(1), Layout(4), Layout(2, 3)])
def test_the_largest_context_is_the_largest(target: str, layout: Layout):
    there = deployment(target)
    caches = Caches.of(SCOUT, "static", "bfloat16", None)
    tokens = there.largest_context(caches, layout)
    assert 1 < tokens < SCOUT.max_position_embeddings
    assert there.fits(caches, tokens, layout)
    assert not there.fits(caches, tokens + layout.context, layout)


def test_no_fewer_gpus_would_do():
    there, caches = deployment(), Caches.of(SCOUT, "static", "bfloat16", None)
    for context in (10**5, 10**6, 5 * 10**6, 10_485_760):
        layout = there.tensor_parallel(caches, context)
        assert layout is not None
        assert there.fits(caches, context, layout)
        assert all(not there.fits(caches, context, Layout(n)) for n in (1, 2, 4, 8) if n < layout.tensor)
    small = dataclasses.replace(there, memory=20 * 10**9)
    split = small.layout_for(caches, 10_485_760)
    assert split is not None
    assert split.tensor == 8
    assert split.context > 1
    assert small.fits(caches, 10_485_760, split)
    assert not small.fits(caches, 10_485_760, Layout(8, split.context - 1))


def test_weights_that_fit_on_no_gpu():
    there, caches = deployment(memory=5 * 10**9), Caches.of(SCOUT, "static", "bfloat16", None)
    assert there.largest_context(caches, Layout(8)) == 0
    assert there.layout_for(caches, 1000) is None
    assert "layers would have to be divided" in there.reason(caches, 1000, None)
