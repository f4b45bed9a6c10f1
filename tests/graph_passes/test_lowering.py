"""Lowering passes: how often they fire, why not elsewhere, that they run once, and that logits stay."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx_ir as ir
import pytest

from l4convert.graph_passes import PASSES, lower_attention_to_gqa
from l4convert.graph_passes.providers import CPU
from l4convert.quantization.recipe import Scheme, load_recipe
from l4convert.targets import TARGETS
from tests.graph_passes.mutations import insert_after
from tests.graph_passes.rounding import everything, recipe
from tests.graphs import Client, canonical, op_counts, outputs, relative_error, run_passes, snapshot, token_ids

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
INT4 = everything(Scheme("int4", 32, "absmax"))


def prepared(checkpoint, rules, kv_cache="growing"):
    model = canonical(checkpoint, kv_cache)
    run_passes(model, *CANONICAL, recipe=rules)
    return model


@pytest.mark.parametrize("kv_cache", ["growing", "windowed", "static"])
@pytest.mark.parametrize("layout", ["scout", "maverick", "all global"])
def test_attention_becomes_the_kernel_in_every_form_of_the_cache(layouts, layout, kv_cache):
    checkpoint = layouts[layout]
    model = prepared(checkpoint, load_recipe("none"), kv_cache)
    expected = outputs(model, checkpoint.config, kv_cache)
    (report,) = run_passes(model, "lower_attention_to_gqa")
    assert (report.fired, report.skipped) == (4, ())
    counts = op_counts(model)
    assert counts["GroupQueryAttention"] == counts["If"] == counts["Attention"] == 4
    assert relative_error(outputs(model, checkpoint.config, kv_cache), expected) <= 1e-5


def test_the_kernel_is_what_usually_runs(scout, monkeypatch):
    """A wrong scale in the kernel's branch shows in one call, a continued one, token by token and in a batch."""
    model = prepared(scout, load_recipe("none"))
    before = Client(model, scout.config, "growing")
    original = lower_attention_to_gqa.group_query_attention

    def wrong(b, spec, *args):
        return original(b, dataclasses.replace(spec, head_dim=4), *args)

    monkeypatch.setattr(lower_attention_to_gqa, "group_query_attention", wrong)
    run_passes(model, "lower_attention_to_gqa")
    after = Client(model, scout.config, "growing")
    one, two = token_ids(1), token_ids(2)
    assert relative_error(after.logits(one, [29]), before.logits(one, [29])) > 1e-3
    assert relative_error(after.logits(one, [20, 9]), before.logits(one, [20, 9])) > 1e-3
    assert relative_error(after.logits(two, [1] * 29), before.logits(two, [1] * 29)) > 1e-3
    assert relative_error(after.logits(two, [29]), before.logits(two, [29])) > 1e-3


def test_one_token_far_into_a_text_comes_with_the_one_before(scout, monkeypatch):
    """In static caches of global layers; a wrong token before shows from there on, and the right one does not."""
    ids, calls = token_ids(1), [5, *[1] * 24]

    def logits(far_tokens):
        model = prepared(scout, load_recipe("none"), "static")
        lower_attention_to_gqa.run(model, load_recipe("none"), dataclasses.replace(CPU, far_tokens=far_tokens))
        return Client(model, scout.config, "static").logits(ids, calls)

    near = logits(None)
    assert relative_error(logits(9), near) <= 1e-5
    original = lower_attention_to_gqa._with_past_again

    def wrong(b, inputs, heads, call):
        return original(b, inputs._replace(past_value=b.op("Neg", inputs.past_value)), heads, call)

    monkeypatch.setattr(lower_attention_to_gqa, "_with_past_again", wrong)
    far = logits(9)
    assert relative_error(far[:, :10], near[:, :10]) <= 1e-5
    assert relative_error(far[:, 10:], near[:, 10:]) > 1e-3


# (recipe, layout) -> the contrib ops of the experts; the pass's fired count is their sum.
EXPERTS = {
    ("none", "scout"): {"MoE": 4},
    ("none", "top-2"): {"MoE": 4},
    ("int4", "scout"): {"QMoE": 4},
    ("int4", "maverick"): {"QMoE": 2},
    ("int4", "top-2"): {"QMoE": 4},
    ("int4", "unfused maverick, top-2"): {"QMoE": 2},
    ("fp8 weights", "scout"): {"MoE": 4},
    ("fp8 weights", "top-2"): {"MoE": 4},
}
RECIPES = {"none": load_recipe("none"), "int4": INT4, "fp8 weights": everything(Scheme("fp8"))}


@pytest.mark.parametrize(("name", "layout"), EXPERTS)
def test_experts_become_a_kernel(layouts, name, layout):
    checkpoint, expected_ops = layouts[layout], EXPERTS[name, layout]
    model = prepared(checkpoint, RECIPES[name])
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "lower_moe_to_qmoe")
    assert (report.fired, report.skipped) == (sum(expected_ops.values()), ())
    assert not model.functions.keys() & {key for key in model.functions if key[1] == "MoE"}
    kernels = Counter(n.op_type for n in model.graph if n.domain == "com.microsoft")
    assert kernels == expected_ops
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5


def test_rounded_activations_keep_the_definition(scout):
    model = prepared(scout, load_recipe("fp8-experts"))
    before = snapshot(model)
    (report,) = run_passes(model, "lower_moe_to_qmoe")
    assert report.fired == 0
    assert dict(report.skipped) == {
        f"layers.{i}/feed_forward/experts/moe": "the kernel cannot round activations between its two matrix products"
        for i in range(4)
    }
    assert snapshot(model) == before


def test_experts_that_are_not_stored_keep_the_definition(scout):
    model = prepared(scout, load_recipe("none"))
    cast = "layers.0/feed_forward/experts/model.layers.0.feed_forward.experts.down_proj/cast"
    insert_after(model, cast, "Neg")
    expected = outputs(model, scout.config)
    (report,) = run_passes(model, "lower_moe_to_qmoe")
    assert report.fired == 3
    assert report.skipped == (("layers.0/feed_forward/experts/moe", "the experts' weights are not stored tensors"),)
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5


# recipe, layout -> products that become the 4-bit kernel
PRODUCTS = {("int4", "scout"): 28, ("int4", "maverick"): 28, ("none", "scout"): 0, ("fp8 weights", "scout"): 0}


@pytest.mark.parametrize(("name", "layout"), PRODUCTS)
def test_products_become_the_4_bit_kernel(layouts, name, layout):
    checkpoint = layouts[layout]
    model = prepared(checkpoint, RECIPES[name])
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "lower_matmul_to_nbits")
    assert report.fired == PRODUCTS[name, layout]
    assert op_counts(model).get("MatMulNBits", 0) == report.fired
    reasons = {why for _, why in report.skipped}
    assert reasons == ({"no 4-bit kernel for FLOAT8E4M3FN of 2 axes"} if name == "fp8 weights" else set())
    assert len(report.skipped) == (28 if name == "fp8 weights" else 0)
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5


def test_a_product_with_a_4_bit_table_of_scales_that_is_computed_is_left(scout):
    model = prepared(scout, recipe(("*.0.self_attn.q_proj.weight", Scheme("int4", 32, "absmax"))))
    (scale,) = [v for n, v in model.graph.initializers.items() if n.endswith("q_proj.weight_scale")]
    double = ir.Node("", "Add", [scale, scale], num_outputs=1, name="double")
    double.outputs[0].name = "double"
    model.graph.insert_before(model.graph[0], double)
    (user,) = [n for n, _ in scale.uses() if n.op_type == "DequantizeLinear"]
    user.replace_input_with(1, double.outputs[0])
    expected = outputs(model, scout.config)
    assert run_passes(model, "lower_matmul_to_nbits")[0].fired == 0
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5


def test_activation_scales_are_split_in_graphs_and_functions(scout):
    model = prepared(scout, load_recipe("fp8"))
    expected = outputs(model, scout.config, optimize=False)
    (report,) = run_passes(model, "split_activation_scales")
    # A layer rounds the inputs of q, k and v (one value), o, gate and up (one), down; the function of all layers two.
    assert (report.fired, report.skipped) == (4 * 4 + 2, ())
    before = snapshot(model)
    assert run_passes(model, "split_activation_scales")[0].fired == 0
    assert snapshot(model) == before
    assert relative_error(outputs(model, scout.config, optimize=False), expected) <= 1e-5
    assert relative_error(outputs(model, scout.config), expected) <= 1e-2  # and optimized it loads


@pytest.mark.parametrize("name", ["none", "int4", "fp8 weights"])
def test_weights_have_no_activation_scales(scout, name):
    model = prepared(scout, RECIPES[name])
    assert run_passes(model, "split_activation_scales")[0].fired == 0


@pytest.mark.parametrize("kv_cache", ["growing", "windowed", "static"])
@pytest.mark.parametrize("layout", ["scout", "maverick", "top-2", "unfused", "tied with biases"])
def test_the_body_of_every_function_is_what_it_replaced(layouts, layout, kv_cache):
    checkpoint = layouts[layout]
    model = canonical(checkpoint, kv_cache)
    expected = outputs(model, checkpoint.config, kv_cache)
    run_passes(model, "outline_attention", "fuse_experts")
    calls = sum(n.domain == "l4convert" for n in model.graph)
    (report,) = run_passes(model, "inline_functions")
    assert (report.fired, report.skipped) == (calls, ())
    assert calls == (6 if layout == "maverick" else 8)
    assert not model.functions
    assert {n.domain for n in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}
    assert set(model.graph.opset_imports) == {""}
    assert relative_error(outputs(model, checkpoint.config, kv_cache), expected) <= 1e-5


@pytest.mark.parametrize("name", ["int4", "fp8"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_pass_is_idempotent_where_a_target_runs_it(scout, target, name):
    rules = INT4 if name == "int4" else load_recipe(name)
    model = canonical(scout)
    for graph_pass in (*(p for p in PASSES if p.name in CANONICAL), *TARGETS[target].lowering):
        graph_pass(model, rules)
        before = snapshot(model)
        assert graph_pass(model, rules).fired == 0, graph_pass.name
        assert snapshot(model) == before, graph_pass.name
