"""Calls of MoE with packed weights, for the plugin; their functions still define them, bit for bit."""

from __future__ import annotations

import zlib

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.graph_passes import pack_experts
from l4convert.plugins.moe import layout
from l4convert.plugins.moe.packed import LAYOUT, Inputs
from l4convert.quantization.recipe import Scheme, load_recipe
from tests.checkpoints import write_random_checkpoint
from tests.graph_passes.mutations import insert_after
from tests.graph_passes.rounding import EXPERTS, everything, recipe
from tests.graphs import canonical, outputs, run_passes, snapshot

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
INT4, FP8, W8A8 = Scheme("int4", 32, "absmax"), Scheme("fp8"), Scheme("fp8", activations="dynamic")
FORMS = {"int4": ir.DataType.INT32, "fp8": ir.DataType.INT64}


def calls(model):
    return [node for node in model.graph if node.op_type == "MoE"]


@pytest.mark.parametrize(
    ("layout_name", "rules", "weights"),
    [
        ("scout", everything(INT4), "int4"),
        ("top-2", everything(Scheme("int4", 64, "lse")), "int4"),
        ("scout", load_recipe("fp8"), "fp8"),
        ("top-2", recipe((EXPERTS, W8A8)), "fp8"),
    ],
    ids=["int4", "int4 lse, top-2", "fp8", "fp8, top-2"],
)
def test_quantized_weights_become_words(layouts, layout_name, rules, weights):
    checkpoint = layouts[layout_name]
    model = canonical(checkpoint)
    run_passes(model, *CANONICAL, recipe=rules)
    expected = outputs(model, checkpoint.config, optimize=False)
    (report,) = run_passes(model, "pack_experts")
    assert (report.fired, report.skipped, len(calls(model))) == (4, (), 4)
    for call in calls(model):
        named = dict(zip(Inputs._fields, call.inputs, strict=True))
        attributes = {name: attribute.value for name, attribute in call.attributes.items()}
        assert (attributes["weights"], attributes["layout"]) == (weights, LAYOUT)
        experts, hidden, width = (attributes[x] for x in ("num_experts", "hidden_size", "intermediate_size"))
        for name, depth, columns in (("gate_up", hidden, 2 * width), ("down", width, hidden)):
            words, scales = named[name].const_value, named[f"{name}_scale"].const_value
            assert (words.dtype, words.dims) == (FORMS[weights], (experts, columns, depth // 8))
            assert scales.dims == (experts, depth // attributes[f"{name}_block"], columns)
        assert [value.name for value in model.functions[call.op_identifier()].inputs] == list(Inputs._fields)
    np.testing.assert_array_equal(outputs(model, checkpoint.config, optimize=False), expected)
    before = snapshot(model)
    (again,) = run_passes(model, "pack_experts")
    assert (again.fired, again.skipped) == (0, ())
    assert snapshot(model) == before


def test_layers_share_a_function_unless_their_blocks_differ(scout):
    model = canonical(scout)
    rules = recipe(("model.layers.0.*experts.*", Scheme("int4", 64, "absmax")), (EXPERTS, INT4))
    run_passes(model, *CANONICAL, "pack_experts", recipe=rules)
    overloads = [call.overload for call in calls(model)]
    assert overloads == ["e4_top1_int4_blocks64_64", *["e4_top1_int4_blocks32_32"] * 3]
    assert sorted(key[2] for key in model.functions if key[1] == "MoE") == sorted(set(overloads))


@pytest.mark.parametrize(
    ("layout_name", "rules", "reason"),
    [
        ("scout", load_recipe("none"), "its weights are not quantized in blocks"),
        ("scout", recipe(("*experts.down_proj", INT4)), "its weights are not quantized in blocks"),
        ("scout", recipe((EXPERTS, FP8)), "no kernel has fp8 weights with unrounded activations"),
        (
            "scout",
            recipe(("*experts.down_proj", INT4), (EXPERTS, FP8)),
            "its two weights are quantized in different ways",
        ),
    ],
    ids=["none", "one", "fp8 without activations", "mixed"],
)
def test_what_no_kernel_takes_is_left_with_the_reason(layouts, layout_name, rules, reason):
    model = canonical(layouts[layout_name])
    run_passes(model, *CANONICAL, recipe=rules)
    before = snapshot(model)
    (report,) = run_passes(model, "pack_experts")
    assert report.fired == 0
    assert len(report.skipped) == len(calls(model))
    assert all(said.endswith(reason) for _, said in report.skipped)
    assert snapshot(model) == before


def test_experts_of_another_width_are_left(tmp_path):
    path = write_random_checkpoint(tmp_path, intermediate_size=96, num_hidden_layers=1)
    model = canonical(open_checkpoint(path))
    run_passes(model, *CANONICAL, recipe=everything(INT4))
    (report,) = run_passes(model, "pack_experts")
    assert report.fired == 0
    assert dict(report.skipped).popitem()[1].endswith("is 96 x 64: the kernels take multiples of 64, and blocks of 32")


def test_stacks_beyond_the_limit_of_tensorrt_are_left(scout, monkeypatch):
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=everything(INT4))
    monkeypatch.setattr(pack_experts, "MOST_ELEMENTS", 4 * 128 * 64 // 8 - 1)
    (report,) = run_passes(model, "pack_experts")
    assert report.fired == 0
    assert all("which no TensorRT tensor may have" in said for _, said in report.skipped)


def test_weights_that_are_changed_after_they_were_dequantized_are_left(scout):
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=everything(INT4))
    dequantize = calls(model)[1].inputs[3].producer()
    insert_after(model, dequantize.name, "Neg")
    expected = outputs(model, scout.config, optimize=False)
    (report,) = run_passes(model, "pack_experts")
    assert report.fired == 3
    np.testing.assert_array_equal(outputs(model, scout.config, optimize=False), expected)


def test_another_order_of_codes_is_another_layout():
    """A plugin tells words of another order by the version alone."""
    digest = zlib.crc32(bytes(layout.K_ORDER))
    assert {LAYOUT: (layout.GROUP, digest)} == {1: (64, 98340247)}
