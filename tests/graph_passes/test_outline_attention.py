"""Attention is outlined in every layout and form of the cache, and only where it is the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph_passes.mutations import constant, insert_after, node, replace_input, set_attributes
from tests.graphs import canonical, op_counts, outputs, relative_error, run_passes, snapshot

LAYOUTS = ["scout", "maverick", "tied with biases", "all global"]  # others differ in their experts only
LOCAL, GLOBAL = "layers.0/self_attn", "layers.3/self_attn"


@pytest.mark.parametrize("kv_cache", ["growing", "windowed", "static"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_becomes_one_call_that_computes_the_same(layouts, layout, kv_cache):
    checkpoint = layouts[layout]
    model = canonical(checkpoint, kv_cache)
    expected = outputs(model, checkpoint.config, kv_cache)
    (report,) = run_passes(model, "outline_attention")
    assert (report.fired, report.skipped) == (4, ())
    assert op_counts(model)["LongContextAttention"] == 4
    assert "Attention" not in op_counts(model)
    assert relative_error(outputs(model, checkpoint.config, kv_cache), expected) <= 1e-5


@pytest.mark.parametrize("kv_cache", ["growing", "windowed", "static"])
def test_a_second_run_changes_nothing(scout, kv_cache):
    model = canonical(scout, kv_cache)
    run_passes(model, "outline_attention")
    before = snapshot(model)
    (report,) = run_passes(model, "outline_attention")
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_layers_of_one_kind_share_a_function(scout):
    model = canonical(scout)
    run_passes(model, "outline_attention")
    assert len(model.functions) == 2
    calls = [n for n in model.graph if n.op_type == "LongContextAttention"]
    assert [len(n.inputs) for n in calls] == [8, 8, 8, 6]
    assert [n.attributes["chunk_size"].value for n in calls] == [8, 8, 8, 0]
    assert [n.attributes["rope"].value for n in calls] == [1, 1, 1, 0]


def _other_mask(model):
    node(model, f"{LOCAL}/And").op_type = "Or"


def _half_split_rope(model):
    set_attributes(model, f"{LOCAL}/RotaryEmbedding", interleaved=0)


def _other_rope_on_the_key(model):
    set_attributes(model, f"{LOCAL}/RotaryEmbedding_1", interleaved=0)


def _other_temperature_formula(model):
    replace_input(model, f"{GLOBAL}/Add_2", 1, constant(model, 2.0))


def _scaled_query(model):
    replace_input(model, f"{GLOBAL}/Mul_1", 1, constant(model, 2.0))


def _chunk_of_rope_is_not_the_masks(model):
    replace_input(model, f"{LOCAL}/Mod", 1, constant(model, 4, np.int64))


def _chunk_of_queries_is_not_that_of_keys(model):
    replace_input(model, f"{LOCAL}/Div_2", 1, constant(model, 16, np.int64))


def _extra_op(model):
    insert_after(model, f"{LOCAL}/Attention", "Tanh")


def _extra_op_on_the_mask(model):
    insert_after(model, f"{LOCAL}/Equal", "Not")


def _no_mask(model):
    replace_input(model, f"{LOCAL}/Attention", 3, None)


def _other_scale(model):
    set_attributes(model, f"{LOCAL}/Attention", scale=0.5)


def _other_norm_of_the_key(model):
    set_attributes(model, f"{LOCAL}/RMSNormalization_1", epsilon=1e-2)


def _key_without_norm(model):
    replace_input(model, f"{LOCAL}/Transpose", 0, node(model, f"{LOCAL}/Reshape_3").outputs[0])


def _weighted_norm(model):
    replace_input(model, f"{LOCAL}/RMSNormalization", 1, constant(model, np.arange(16)))


def _values_of_another_layer(model):
    replace_input(model, f"{LOCAL}/Attention", 2, node(model, f"{LOCAL}/Slice_1").outputs[0])


def _constant_query(model):
    """A learned query, say: the same for every token."""
    zero = insert_after(model, f"{LOCAL}/Transpose_2", "Mul", constant(model, 0.0)).outputs[0]
    learned = insert_after(model, f"{LOCAL}/Transpose_2/extra", "Add", zero)
    learned.replace_input_with(0, constant(model, np.ones(16)))


def _computed_shape(model):
    reshape = node(model, f"{LOCAL}/Reshape_2")
    shape = ir.Node("", "Identity", [reshape.inputs[1]], num_outputs=1, name="identity")
    shape.outputs[0].name = "identity"
    model.graph.insert_before(reshape, shape)
    reshape.replace_input_with(1, shape.outputs[0])


MUTATIONS: dict[Callable[[ir.Model], None], tuple[str, str]] = {
    _other_mask: (LOCAL, f"Or {LOCAL}/And stands where a And should"),
    _half_split_rope: (LOCAL, f"RotaryEmbedding {LOCAL}/RotaryEmbedding has other attributes"),
    _other_rope_on_the_key: (LOCAL, f"RotaryEmbedding {LOCAL}/RotaryEmbedding_1 has other attributes"),
    _other_temperature_formula: (GLOBAL, "has other attributes or another value"),
    _scaled_query: (GLOBAL, "the query is scaled by something other than the temperature"),
    _chunk_of_rope_is_not_the_masks: (LOCAL, "stands where"),
    _chunk_of_queries_is_not_that_of_keys: (LOCAL, "Constant mutation/constant has other attributes or another value"),
    _extra_op: (LOCAL, f"{LOCAL}/Attention is not followed by one Transpose"),
    _extra_op_on_the_mask: (LOCAL, f"Not {LOCAL}/Equal/extra stands where a Equal should"),
    _no_mask: (LOCAL, "no attention mask"),
    _other_scale: (LOCAL, f"Attention {LOCAL}/Attention has other attributes"),
    _other_norm_of_the_key: (LOCAL, f"RMSNormalization {LOCAL}/RMSNormalization_1 has other attributes"),
    _key_without_norm: (LOCAL, f"Reshape {LOCAL}/Reshape_3 stands where a RMSNormalization should"),
    _weighted_norm: (LOCAL, "mutation/constant stands where"),
    _constant_query: (LOCAL, "no Reshape that splits heads"),
    _values_of_another_layer: (LOCAL, "stands where"),
    _computed_shape: (LOCAL, "no Reshape that splits heads"),
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__.strip("_"))
def test_what_is_not_the_definition_is_left_alone_with_the_reason(scout, mutation):
    where, reason = MUTATIONS[mutation]
    model = canonical(scout)
    mutation(model)
    expected = outputs(model, scout.config)
    (report,) = run_passes(model, "outline_attention")
    assert report.fired == 3
    ((skipped, why),) = report.skipped
    assert skipped == f"{where}/Attention"
    assert reason in why
    assert op_counts(model)["Attention"] == 1
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5


def test_a_changed_result_is_seen_by_these_tests(scout):
    """The mutations above change the logits: a pass that fired on them would show."""
    original = outputs(canonical(scout), scout.config)
    harmless = {_computed_shape}
    for mutation in MUTATIONS.keys() - harmless:
        model = canonical(scout)
        mutation(model)
        assert relative_error(outputs(model, scout.config), original) > 1e-4, mutation


@pytest.mark.parametrize("kv_cache", ["windowed", "static"])
def test_a_cache_written_otherwise_is_left_alone(scout, kv_cache):
    model = canonical(scout, kv_cache)
    writer = model.graph.outputs[1].producer()
    assert writer.op_type == {"windowed": "Slice", "static": "ScatterND"}[kv_cache]
    index = {"windowed": 0, "static": 2}[kv_cache]
    negated = ir.Node("", "Neg", [writer.inputs[index]], num_outputs=1, name="negated")
    negated.outputs[0].name = "negated"
    model.graph.insert_before(writer, negated)
    writer.replace_input_with(index, negated.outputs[0])
    expected = outputs(model, scout.config, kv_cache)
    (report,) = run_passes(model, "outline_attention")
    assert report.fired == 3
    assert f"{kv_cache}: no {writer.op_type} that gives" in report.skipped[0][1]
    assert relative_error(outputs(model, scout.config, kv_cache), expected) <= 1e-5


@pytest.mark.parametrize("operation", ["Div", "Mul"])
def test_layers_that_differ_in_a_constant_do_not_share_a_function(layouts, operation):
    """The floor (Div) and the strength (Mul) of one layer's temperature."""
    checkpoint = layouts["all global"]
    model = canonical(checkpoint)
    replace_input(model, f"layers.1/self_attn/{operation}", 1, constant(model, 3.0))
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "outline_attention")
    assert (report.fired, report.skipped) == (4, ())
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5


def test_layers_with_other_norms_do_not_share_a_function(scout):
    model = canonical(scout)
    for name in ("RMSNormalization", "RMSNormalization_1"):
        set_attributes(model, f"layers.1/self_attn/{name}", epsilon=0.5)
    expected = outputs(model, scout.config)
    (report,) = run_passes(model, "outline_attention")
    assert (report.fired, report.skipped) == (4, ())
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5


def test_values_inside_that_others_use_stay(scout):
    model = canonical(scout)
    inner = node(model, f"{LOCAL}/And").outputs[0]
    used = ir.Node("", "Cast", [inner], ir.convenience.convert_attributes({"to": 1}), num_outputs=1, name="spy")
    used.outputs[0].name, used.outputs[0].type = "spy", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(used)
    model.graph.outputs.append(used.outputs[0])
    expected = outputs(model, scout.config)
    (report,) = run_passes(model, "outline_attention")
    assert report.fired == 4
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5
