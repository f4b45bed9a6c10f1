"""What fits on GPUs and how fast it can be: against closed forms, brute force, measurements and published figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.presets import MAVERICK, SCOUT
from l4convert.errors import UsageError
from l4convert.pipeline import PlanOptions, plan_conversion
from l4convert.planning import ConversionPlan
from l4convert.planning.caches import Caches, cache_choices
from l4convert.planning.figures import Figure
from l4convert.planning.fit import Deployment
from l4convert.planning.serving import plan_serving
from l4convert.planning.shards import Weights, check_degree, degrees, weights_of
from l4convert.planning.speed import Layout, distinct_experts, multiplied_elements, visible_keys
from l4convert.planning.tokens import parse_context, short_tokens
from l4convert.planning.use import Artifact, ServingPlan, Wanted
from l4convert.planning.working import Call, working_figures
from l4convert.quantization.kv import kv_scheme
from l4convert.quantization.recipe import load_recipe
from l4convert.targets.hardware import load_hardware

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan() -> ConversionPlan:
    """Scout in INT4 on H100s, all of its positions."""
    return plan_conversion(PlanOptions(preset="scout", target="h100", context="10M"))


@pytest.fixture(scope="module")
def scout(plan: ConversionPlan) -> ServingPlan:
    assert plan.serving is not None
    return plan.serving


@pytest.fixture(scope="module")
def serving(plan: ConversionPlan) -> Callable[..., ServingPlan]:
    """Plans the use of the same weights elsewhere; ``target`` and ``form`` are for arithmetic, not for real graphs."""

    def run(
        hardware: str | None, context: int | None, *, target: str = "tensorrt", form: str = "static", **changes: Any
    ) -> ServingPlan:
        artifact = Artifact(SCOUT, plan.table, load_recipe("int4", 128), target, form, "bfloat16", ("fp8",))
        machine = None if hardware is None else load_hardware(hardware)
        wanted = Wanted(context, 1, 512, None, machine)
        return plan_serving(artifact, dataclasses.replace(wanted, **changes))

    return run


def deployment(target: str = "tensorrt", memory: int = 80 * 10**9, config: Any = SCOUT) -> Deployment:
    weights = Weights({("experts", "width"): 50 * 10**9, ("other", "nothing"): 10**9}, config.num_key_value_heads)
    return Deployment(config, target, "bfloat16", weights, memory, 1, (1, 2, 4, 8), 512)


# --- the published figures ---------------------------------------------------------------------------------------


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
    assert "each of 4 would hold 1.4 GB too much" in fp8.reason


def test_the_weights_are_about_60_gb(plan: ConversionPlan):
    assert (plan.target, plan.compute, plan.kv_cache) == ("tensorrt", "bfloat16", "static")
    assert plan.bytes == pytest.approx(60e9, rel=0.03)
    # 4 bits and a 16-bit scale for 128 of them, but embedding, head, norms and routers in 16 bits.
    plain = 2 * SCOUT.vocab_size * SCOUT.hidden_size
    assert plan.bytes == pytest.approx((plan.parameters - plain) * (0.5 + 2 / 128) + 2 * plain, rel=1e-3)


# --- caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "each"), [(None, 49152), ("fp8", 24576), ("int8", 24576), ("int4", 12288)])
def test_bytes_of_a_token(dtype: str | None, each: int):
    scheme = None if dtype is None else kv_scheme(dtype)
    caches = Caches.of(SCOUT, "static", "bfloat16", scheme)
    assert caches.bytes_per_token == each == 12 * 2 * 8 * 128 * 2 * each // 49152
    small, large = (caches.bytes(3, tokens) for tokens in (8192, 10**6))
    assert small["chunked"] == large["chunked"] == 3 * 3 * 8192 * each
    assert large["global"] - small["global"] == 3 * (10**6 - 8192) * each
    assert caches.scale_bytes == (0 if dtype is None else 48 * 2 * 8 * 128 * 4)


def test_growing_caches_hold_everything_on_every_layer_and_twice_in_a_call():
    growing, static = (Caches.of(SCOUT, form, "float32", None) for form in ("growing", "static"))
    assert growing.bytes_per_token == 4 * static.bytes_per_token
    assert (growing.copies, static.copies) == (2, 1)
    figures = growing.figures(1, 10**5)
    assert sum(figure.value for figure in figures) == 2 * sum(growing.bytes(1, 10**5).values())


def test_quantizing_global_layers_only_leaves_the_others():
    caches = Caches.of(SCOUT, "static", "bfloat16", kv_scheme("int4", "channel", "global"))
    plain = Caches.of(SCOUT, "static", "bfloat16", None)
    assert caches.bytes(1, 10**6)["chunked"] == plain.bytes(1, 10**6)["chunked"]
    assert 4 * caches.bytes(1, 10**6)["global"] == plain.bytes(1, 10**6)["global"]
    assert caches.scaled_layers == 12
    chosen = cache_choices(SCOUT, "static", "bfloat16", kv_scheme("int4", "channel", "global"))
    assert [c.scaled_layers for c in chosen] == [0, 48, 48, 12]


# --- weights on several GPUs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int4", "fp8", "none"])
def test_shards_of_weights(maverick_layout: Path, recipe: str):
    """Two key/value heads: two GPUs have one each, four share them in pairs."""
    table = plan_conversion(PlanOptions(maverick_layout, recipe=recipe, target="tensorrt")).table
    weights = weights_of(table, open_checkpoint(maverick_layout).config)
    assert weights.rank(1) == weights.bytes == sum(row.bytes for row in table)
    replicated = sum(n for (_, cut), n in weights.parts.items() if cut == "nothing")
    assert 2 * weights.rank(2) - weights.bytes == pytest.approx(replicated)
    # Norms, routers and rotary tables; in FP8 also the scales of what is cut by its inputs, one an output.
    names = [row for row in table if row.kind in ("norms", "router", "rotary tables, constants")]
    back = [row for row in table if row.kind == "scales" and re.search("(down|o)_proj", row.name)]
    assert replicated == sum(row.bytes for row in names) + (sum(row.bytes for row in back) if recipe == "fp8" else 0)
    keys = sum(row.bytes for row in table if re.search("[kv]_proj", row.name))
    assert keys > 0
    assert weights.rank(2) - weights.rank(4) == pytest.approx((weights.bytes - replicated - keys) / 4)


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


# --- what fits ---------------------------------------------------------------------------------------------------


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


# --- working memory against what was measured --------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "layers"), [(1, 1), (512, 1), (512, 2), (512, 4)])
def test_scratch_of_tensorrt_rtx(tokens: int, layers: int):
    """The builder's own figures: benchmarks/results and, for several layers, benchmarks/engine_forms.py."""
    path = REPO / "benchmarks" / "results" / "2026-11-22-engine-forms.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["attention"]
    folded = {(r["capacity"], r["tokens"]): r.get("scratch_bytes") for r in rows if "folded" in r["form"]}
    measured = {1: folded[131072, tokens], 2: 1895080960, 4: 3241580032}[layers]
    caches = dataclasses.replace(Caches.of(SCOUT, "static", "bfloat16", None), global_layers=layers)
    figures = working_figures("tensorrt-rtx", Call(SCOUT, 1, tokens, 131072, 1, 2, caches))
    planned = sum(figure.value for figure in figures if figure.name in ("copy of a large cache", "masks"))
    assert planned == pytest.approx(measured, rel=0.015)


# --- speed -------------------------------------------------------------------------------------------------------


def test_distinct_experts_of_a_batch():
    random = np.random.default_rng(0)
    for experts, tokens in ((16, 1), (16, 8), (128, 64)):
        drawn = [len(set(random.integers(0, experts, tokens))) for _ in range(2000)]
        assert distinct_experts(experts, 1, tokens) == pytest.approx(np.mean(drawn), rel=0.02)


def test_keys_that_are_seen():
    config = dataclasses.replace(SCOUT, attention_chunk_size=8, layers=SCOUT.layers[:4])
    for context in (1, 7, 8, 9, 20, 32):
        every = sum(p + 1 + 3 * (p % 8 + 1) for p in range(context))
        assert visible_keys(config, context)[1] == every
    chunk = np.mean([p % 8 + 1 for p in range(8)])
    assert visible_keys(config, 32)[0] == 32 + 3 * chunk


def test_multiplied_weights_are_the_active_parameters(plan: ConversionPlan):
    elements = multiplied_elements(SCOUT, load_recipe("int4"))
    assert elements.keys() == {"plain"}
    norms = (2 * 48 + 1) * SCOUT.hidden_size
    assert plan.active_parameters - elements["plain"] == SCOUT.vocab_size * SCOUT.hidden_size + norms
    split = multiplied_elements(SCOUT, load_recipe("fp8"))
    assert sum(split.values()) == elements["plain"]
    assert split["plain"] == SCOUT.vocab_size * SCOUT.hidden_size + 48 * 16 * SCOUT.hidden_size  # head, routers


def test_decode_reads_active_weights_and_caches(serving: Callable[..., ServingPlan]):
    one = serving("h100", 131072).chosen
    active = 14.5e9  # Scout's 17.2 B less embedding and head
    weights = active * (0.5 + 2 / 128) + 2 * SCOUT.vocab_size * SCOUT.hidden_size
    caches = 4096 * (12 * 131072 + 36 * 8193 / 2)
    assert one.decode == pytest.approx(3.35e12 / (weights + caches), rel=0.1)
    rates = [serving("h200", 131072, batch=n).chosen.decode or 0.0 for n in (1, 2, 8)]
    assert rates[0] < rates[1] < rates[2] < 8 * rates[0]


def test_a_prompt_takes_at_least_its_arithmetic(serving: Callable[..., ServingPlan]):
    found = serving("h100", 131072, tensor_parallel=1).result("prefill")
    attention = 4 * 5120 * (12 * 131072**2 / 2 + 36 * 16 * 8192**2 / 2)
    assert found is not None
    assert found.value == pytest.approx(131072 * 989.4e12 / (2 * 16.14e9 * 131072 + attention), rel=0.01)


# --- every number can be computed from its arithmetic -----------------------------------------------------------


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


# --- what was asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1M", 1 << 20),
        ("10M", 10_485_760),
        ("128k", 131072),
        (" 1.5 m ", 1572864),
        ("0.5k", 512),
        ("10485760", 10485760),
    ],
)
def test_contexts(text: str, tokens: int):
    assert parse_context(text, 10_485_760) == tokens
    assert parse_context(short_tokens(tokens).replace(",", ""), 10_485_760) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "not a number") for text in ("0", "0.3", "1G", "-1", "", "1e6", "1.0000001k")),
        ("11M", "more than the model's 10,485,760 positions"),
    ],
)
def test_contexts_that_are_refused(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_context(text, 10_485_760)


def test_hardware_that_says_little(serving: Callable[..., ServingPlan]):
    spark = serving("dgx-spark", 131072, target="tensorrt-rtx")
    assert "prefill" not in spark.sections
    assert spark.chosen.decode is not None
    assert "target tensorrt-rtx has no caches in int4, int8 yet: for comparison only" in spark.notes
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
