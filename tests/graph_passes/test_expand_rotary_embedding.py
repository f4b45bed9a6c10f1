"""Rotary embeddings as plain arithmetic: ONNX's own operator in the model and by itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from l4convert.frontend.builder import Builder
from tests.graph_passes.mutations import constant, node, replace_input, set_attributes
from tests.graphs import canonical, op_counts, outputs, relative_error, run_passes, snapshot

REASON = "not interleaved, not of three axes, or with position ids"


@pytest.mark.parametrize(("layout", "layers"), [("scout", 3), ("maverick", 3), ("all global", 0)])
def test_queries_and_keys_of_every_layer_with_rope(layouts, layout, layers):
    checkpoint = layouts[layout]
    model = canonical(checkpoint)
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "expand_rotary_embedding")
    assert (report.fired, report.skipped) == (2 * layers, ())
    assert "RotaryEmbedding" not in op_counts(model)
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-6
    before = snapshot(model)
    assert run_passes(model, "expand_rotary_embedding")[0].fired == 0
    assert snapshot(model) == before


@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_operator_of_the_onnx_specification(heads):
    """As onnx's own evaluator computes it."""
    size = 8
    float32 = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=float32, shape=ir.Shape([2, "s", heads * size]))
    tables = [ir.Value(name=n, type=float32, shape=ir.Shape([2, "s", size // 2])) for n in ("cos", "sin")]
    b = Builder()
    y = b.op("RotaryEmbedding", x, *tables, interleaved=1, num_heads=heads)
    y.name, y.type, y.shape = "y", float32, x.shape
    model = ir.Model(ir.Graph([x, *tables], [y], nodes=b.nodes, opset_imports={"": 23}, name="g"), ir_version=11)
    rng = np.random.default_rng(heads)
    feeds = {name: rng.standard_normal((2, 5, size // 2)).astype(np.float32) for name in ("cos", "sin")}
    feeds["x"] = rng.standard_normal((2, 5, heads * size)).astype(np.float32)
    (expected,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    assert run_passes(model, "expand_rotary_embedding")[0].fired == 1
    (actual,) = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def _half_split(model, name):
    set_attributes(model, name, interleaved=0)


def _no_heads(model, name):
    del node(model, name).attributes["num_heads"]


def _with_positions(model, name):
    rotary = node(model, name)
    rotary.resize_inputs(4)
    rotary.replace_input_with(3, constant(model, [[0]], np.int64))


@pytest.mark.parametrize("change", [_half_split, _no_heads, _with_positions])
def test_other_rotations_are_left_with_the_reason(scout, change):
    model = canonical(scout)
    name = "layers.0/self_attn/RotaryEmbedding"
    change(model, name)
    (report,) = run_passes(model, "expand_rotary_embedding")
    assert (report.fired, report.skipped) == (5, ((name, REASON),))
    assert op_counts(model)["RotaryEmbedding"] == 1


def test_other_tables_would_show(scout):
    model = canonical(scout)
    expected = outputs(model, scout.config)
    run_passes(model, "expand_rotary_embedding")
    (first, *_) = [n for n in model.graph if "RotaryEmbedding/Unsqueeze" in (n.name or "")]
    replace_input(model, first.name, 0, node(model, "layers.0/self_attn/Gather_1").outputs[0])
    assert relative_error(outputs(model, scout.config), expected) > 1e-3
