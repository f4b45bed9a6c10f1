"""Calls of MoE with weights as they are stored, for plugins; their functions still define them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from l4convert.graph_passes.absorb_dequantize import QUANTIZED_INPUTS
from l4convert.quantization.recipe import Scheme, load_recipe
from tests.graph_passes.mutations import insert_after
from tests.graph_passes.rounding import EXPERTS, everything, recipe
from tests.graphs import canonical, outputs, relative_error, run_passes, snapshot

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
INT4, FP8 = Scheme("int4", 32, "absmax"), Scheme("fp8")


def calls(model):
    return [node for node in model.graph if node.op_type == "MoE"]


@pytest.mark.parametrize(
    ("layout", "rules", "count", "dtype"),
    [
        ("scout", everything(INT4), 4, ir.DataType.INT4),
        ("top-2", everything(FP8), 4, ir.DataType.FLOAT8E4M3FN),
        ("unfused maverick, top-2", everything(INT4), 2, ir.DataType.INT4),
        ("scout", load_recipe("fp8"), 4, ir.DataType.FLOAT8E4M3FN),
    ],
    ids=["int4", "fp8", "unfused int4", "fp8 with activations"],
)
def test_quantized_weights_become_inputs(layouts, layout, rules, count, dtype):
    checkpoint = layouts[layout]
    model = canonical(checkpoint)
    run_passes(model, *CANONICAL, recipe=rules)
    expected = outputs(model, checkpoint.config, optimize=False)
    (report,) = run_passes(model, "absorb_dequantize")
    assert (report.fired, report.skipped, len(calls(model))) == (count, (), count)
    for call in calls(model):
        named = dict(zip(QUANTIZED_INPUTS, call.inputs, strict=True))
        for name in ("gate_up", "down"):
            values, scales = named[name].const_value, named[f"{name}_scale"].const_value
            assert values.dtype == dtype
            assert values.dims[1] // scales.dims[1] == call.attributes[f"{name}_block"].value
        function = model.functions[call.op_identifier()]
        assert [value.name for value in function.inputs] == list(QUANTIZED_INPUTS)
        assert function.graph[0].op_type == "DequantizeLinear"
    assert relative_error(outputs(model, checkpoint.config, optimize=False), expected) <= 1e-6
    before = snapshot(model)
    (again,) = run_passes(model, "absorb_dequantize")
    assert (again.fired, again.skipped) == (0, ())
    assert snapshot(model) == before


def test_layers_share_a_function_unless_their_blocks_differ(scout):
    model = canonical(scout)
    rules = recipe(("model.layers.0.*experts.*", Scheme("int4", 64, "absmax")), (EXPERTS, INT4))
    run_passes(model, *CANONICAL, "absorb_dequantize", recipe=rules)
    overloads = [call.overload for call in calls(model)]
    assert overloads == ["e4_top1_blocks64_64", *["e4_top1_blocks32_32"] * 3]
    assert sorted(key[2] for key in model.functions if key[1] == "MoE") == sorted(set(overloads))


@pytest.mark.parametrize("rules", [load_recipe("none"), recipe(("*experts.down_proj", INT4))], ids=["none", "one"])
def test_float_weights_are_left_with_the_reason(scout, rules):
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=rules)
    before = snapshot(model)
    (report,) = run_passes(model, "absorb_dequantize")
    reason = "its weights are not quantized in blocks"
    assert report.fired == 0
    assert dict(report.skipped) == {f"layers.{i}/feed_forward/experts/moe": reason for i in range(4)}
    assert snapshot(model) == before


def test_weights_that_are_changed_after_they_were_dequantized_are_left(scout):
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=everything(INT4))
    dequantize = calls(model)[1].inputs[3].producer()
    insert_after(model, dequantize.name, "Neg")
    expected = outputs(model, scout.config, optimize=False)
    (report,) = run_passes(model, "absorb_dequantize")
    assert report.fired == 3
    assert relative_error(outputs(model, scout.config, optimize=False), expected) <= 1e-6
