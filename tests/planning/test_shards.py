"""Weights divided among GPUs: nothing is lost, and the sums are those of the shapes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.presets import MAVERICK, SCOUT
from l4convert.errors import UsageError
from l4convert.pipeline import PlanOptions, plan_conversion
from l4convert.planning import ConversionPlan
from l4convert.planning.caches import Caches
from l4convert.planning.shards import check_degree, degrees, weights_of
from l4convert.planning.working import Call, working_figures


@pytest.mark.parametrize("recipe", ["int4", "fp8", "none"])
def test_shards_of_weights(maverick_layout: Path, recipe: str):
    """Two key/value heads: two GPUs have one each, four share them in pairs."""
    table = plan_conversion(PlanOptions(maverick_layout, recipe=recipe, target="tensorrt")).table
    weights = weights_of(table, open_checkpoint(maverick_layout).config)
    assert weights.rank(1) == weights.bytes == sum(row.bytes for row in table)
    assert weights.experts == {"none": "plain"}.get(recipe, recipe)
    replicated = sum(n for (_, cut), n in weights.parts.items() if cut == "nothing")
    assert 2 * weights.rank(2) - weights.bytes == pytest.approx(replicated)
    # Norms, routers and rotary tables; in FP8 also the scales of what is cut by its inputs, one an output.
    names = [row for row in table if row.kind in ("norms", "router", "rotary tables, constants")]
    back = [row for row in table if row.kind == "scales" and re.search("(down|o)_proj", row.name)]
    assert replicated == sum(row.bytes for row in names) + (sum(row.bytes for row in back) if recipe == "fp8" else 0)
    keys = sum(row.bytes for row in table if re.search("[kv]_proj", row.name))
    assert keys > 0
    assert weights.rank(2) - weights.rank(4) == pytest.approx((weights.bytes - replicated - keys) / 4)


def test_experts_that_the_plugin_has_no_kernel_for_are_dequantized(maverick_layout: Path, tmp_path: Path):
    """FP8 weights whose activations are not rounded: 16 bits of all experts of a layer are in memory."""
    recipe = tmp_path / "weights-only.toml"
    recipe.write_text('name = "w"\ndescription = "d"\n[[rule]]\npattern = "*experts.*"\nscheme = "fp8"\n')
    plan = plan_conversion(PlanOptions(maverick_layout, recipe=str(recipe), target="tensorrt"))
    config = open_checkpoint(maverick_layout).config
    weights = weights_of(plan.table, config)
    assert weights.experts == "dequantized"
    caches = Caches.of(config, "static", "bfloat16", None)
    with_them, without = (
        working_figures("tensorrt", Call(config, 1, 64, 64, 1, 2, caches, experts=form))
        for form in (weights.experts, "plain")
    )
    assert with_them[:-1] == without
    stack = config.num_local_experts * config.hidden_size * config.intermediate_size
    assert (with_them[-1].name, with_them[-1].value) == ("one layer's experts, dequantized", 3 * stack * 2)


def test_scouts_shards_by_hand(plan: ConversionPlan):
    hidden, width, heads, pairs = 5120, 8192, 40 * 128, 2 * 8 * 128
    four_bits = 0.5 + 2 / 128
    cut = 48 * (17 * 3 * hidden * width + 2 * hidden * heads + hidden * pairs) * four_bits + 4 * 202048 * hidden
    whole = (97 * hidden + 48 * 16 * hidden) * 2 + 2 * 8192 * 64 * 4  # norms, routers, rotary tables in float32
    assert weights_of(plan.table, SCOUT).rank(8) == pytest.approx(cut / 8 + whole, rel=1e-4)


def test_degrees_divide_the_heads():
    assert degrees(SCOUT, 128) == degrees(MAVERICK) == (1, 2, 4, 8)
    check_degree(SCOUT, None, 8)
    for wanted, what in ((3, "query heads"), (16, "query heads"), (5, "key/value heads"), (10, "key/value heads")):
        with pytest.raises(UsageError, match=what):
            check_degree(SCOUT, None, wanted)
    with pytest.raises(UsageError, match="INT4 blocks of 128"):
        check_degree(dataclasses.replace(SCOUT, intermediate_size=8192 - 128), 128, 2)
