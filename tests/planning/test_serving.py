"""The use of an artifact: the published figures, arithmetic that can be computed, and hardware that says little."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.errors import UsageError
from l4convert.pipeline import ConvertOptions, PlanOptions, plan_conversion
from l4convert.planning import ConversionPlan
from l4convert.planning.figures import Figure
from l4convert.planning.speed import Layout
from l4convert.planning.use import ServingPlan


def test_scout_on_h100s(scout: ServingPlan):
    weights = scout.sections["memory"][0]
    assert (scout.machine, weights.name) == ("h100", "weights")
    largest = {row.caches.dtype: row.largest[1] for row in scout.rows}
    assert largest["bfloat16"] == pytest.approx(0.4e6, rel=0.1)
    assert largest["fp8"] == largest["int8"] == pytest.approx(0.8e6, rel=0.1)
    assert largest["int4"] == pytest.approx(1.5e6, rel=0.1)
    gpus = {row.caches.dtype: row.layout.gpus for row in scout.rows if row.layout}
    assert gpus == {"bfloat16": 8, "fp8": 8, "int8": 8, "int4": 4}
    fp8 = next(row for row in scout.rows if row.caches.dtype == "fp8")
    assert (fp8.by_bytes, fp8.fewest) == (5, Layout(2, 3))
    assert "each of 4 would hold 1.3 GB too much" in fp8.reason


def test_the_weights_are_about_60_gb(plan: ConversionPlan):
    assert (plan.target, plan.compute, plan.kv_cache) == ("tensorrt", "bfloat16", "static")
    assert plan.bytes == pytest.approx(60e9, rel=0.03)
    # 4 bits and a 16-bit scale for 128 of them, but embedding, head, norms and routers in 16 bits.
    plain = 2 * SCOUT.vocab_size * SCOUT.hidden_size
    assert plan.bytes == pytest.approx((plan.parameters - plain) * (0.5 + 2 / 128) + 2 * plain, rel=1e-3)


def computed(figure: Figure) -> float:
    """The value of a figure's formula: words and what is in brackets without a number are comments."""
    text = re.split(r"[;:]", figure.arithmetic)[0]
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"\([a-zA-Z ,/']*\)", "", text)
    text = re.sub(r"(?<![\w.])x(?!\w)", "*", text).replace("^", "**")
    text = re.sub(r"(?<![\d.])[A-Za-z_'][\w/']*", "", text).replace(",", "")
    assert re.fullmatch(r"[\d.e+\-*/() ]+", text), figure.arithmetic
    return float(eval(text))  # digits and operators only, as was just asserted


@pytest.mark.parametrize(
    ("hardware", "context", "changes"),
    [
        ("h100", 10_485_760, {}),
        ("h100", None, {"batch": 8}),
        ("h100", 131072, {"batch": 8, "tensor_parallel": 2}),
        ("rtx-4090", 1 << 20, {"target": "tensorrt-rtx", "prefill_tokens": 16}),
        ("h200", 1 << 20, {"target": "cuda", "form": "growing"}),
        (None, 131072, {"target": "cpu", "form": "windowed"}),
        (None, 131072, {}),
    ],
)
def test_arithmetic(
    serving: Callable[..., ServingPlan], hardware: str | None, context: int | None, changes: dict[str, Any]
):
    plan = serving(hardware, context, **changes)
    assert plan.sections
    for title, figures in plan.sections.items():
        for figure in figures:
            value = computed(figure)
            if figure.name == "GPUs by bytes alone":
                value = math.ceil(value)
            elif figure.name.startswith("largest context") and "the model has" in figure.arithmetic:
                assert figure.value <= value
                continue
            assert figure.value == pytest.approx(value, rel=1e-3, abs=1), (title, figure)


def test_hardware_that_says_little(serving: Callable[..., ServingPlan]):
    spark = serving("dgx-spark", 131072, target="tensorrt-rtx")
    assert "prefill" not in spark.sections
    assert spark.chosen.decode is not None
    assert "target tensorrt-rtx takes no caches in int4, int8: for comparison only" in spark.notes
    assert any("no rate of bfloat16" in note for note in spark.notes)
    assert any("the memory is the CPU's, too" in note for note in spark.notes)
    host = serving(None, 1024, target="cpu")
    assert host.machine == "this machine"
    assert host.memory is not None
    assert {tuple(row.largest) for row in host.rows} == {(1,)}
    assert any("no bandwidth" in note for note in host.notes)
    nowhere = serving(None, 1 << 20)
    assert (nowhere.machine, nowhere.memory) == (None, None)
    assert nowhere.chosen.cache_bytes == 12 * 4096 * (1 << 20) + 36 * 4096 * 8192
    assert any("--target also takes a GPU" in note for note in nowhere.notes)


def test_a_plan_of_a_conversion_only_says_nothing_of_its_use(nano: Path):
    assert plan_conversion(PlanOptions(nano)).serving is None


def test_a_conversion_is_for_a_runtime_and_the_hint_names_it(nano: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="unknown target 'h100'") as refused:
        plan_conversion(ConvertOptions(nano, tmp_path / "out", target="h100"))
    assert refused.value.hint == "h100 is hardware: convert with --target tensorrt"
