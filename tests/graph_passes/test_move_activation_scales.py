"""FP8 activations with scale 1: in every product and in loops, the same numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES
from l4convert.quantization.activations import round_per_token
from l4convert.quantization.recipe import Scheme, load_recipe
from tests.graph_passes.rounding import everything
from tests.graphs import canonical, outputs, relative_error, run_passes, snapshot
from tests.in_place import run, session_of

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
# Products of a layer: q, k, v, o, and the gate, up and down of a dense block or of the shared expert.
PRODUCTS = 7


def quantize_nodes(model):
    return [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize(("layout", "experts"), [("scout", 4), ("maverick", 2)])
def test_scales_move_behind_every_product(layouts, layout, experts):
    checkpoint, rules = layouts[layout], load_recipe("fp8")
    model = canonical(checkpoint)
    run_passes(model, *CANONICAL, "lower_moe_to_loop", recipe=rules)
    expected = outputs(model, checkpoint.config, optimize=False)
    (report,) = run_passes(model, "move_activation_scales")
    assert (report.fired, report.skipped) == (4 * PRODUCTS + 2 * experts, ())  # two products in each loop
    for node in quantize_nodes(model):
        assert "block_size" not in node.attributes
        assert node.inputs[1].producer().op_type == "Constant"
        assert node.inputs[1].producer().attributes["value"].as_tensor().numpy() == 1
        (user,) = [user for user, _ in node.outputs[0].uses()]
        assert user.op_type == "DequantizeLinear"
    # A sum in another order may round an activation of the next product to the other side: few differ, but those do.
    difference = np.abs(outputs(model, checkpoint.config, optimize=False) - expected) / np.abs(expected).max()
    assert np.median(difference) <= 1e-6
    assert difference.max() <= 0.1
    before = snapshot(model)
    assert run_passes(model, "move_activation_scales")[0].fired == 0
    assert snapshot(model) == before


def test_only_what_is_rounded_is_moved(layouts):
    """fp8-experts: the products of the experts alone; in a function, before there is a loop, none."""
    model = canonical(layouts["scout"])
    run_passes(model, *CANONICAL, recipe=load_recipe("fp8-experts"))
    before = snapshot(model)
    assert run_passes(model, "move_activation_scales")[0].fired == 0
    assert snapshot(model) == before
    run_passes(model, "lower_moe_to_loop")
    assert run_passes(model, "move_activation_scales")[0].fired == 2 * 4


@pytest.mark.parametrize("scheme", [None, Scheme("int4", 32, "absmax"), Scheme("fp8")], ids=["none", "int4", "fp8"])
def test_weights_alone_have_no_scales_to_move(scout, scheme):
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=load_recipe("none") if scheme is None else everything(scheme))
    before = snapshot(model)
    assert run_passes(model, "move_activation_scales")[0].fired == 0
    assert snapshot(model) == before


def test_a_product_with_other_scales_is_left(scout):
    """A product whose operand is quantized with one scale for the tensor is no product of rounded tokens."""
    model = canonical(scout)
    run_passes(model, *CANONICAL, recipe=load_recipe("fp8"))
    (product,) = [n for n in model.graph if (n.name or "").endswith("layers.0/self_attn/o_proj")]
    dequantize = product.inputs[0].producer()
    scale = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.float32(0.5)))], name="half")
    scale.outputs[0].name = "half"
    model.graph.insert_before(model.graph[0], scale)
    for node in (dequantize.inputs[0].producer(), dequantize):
        del node.attributes["block_size"]
        node.replace_input_with(1, scale.outputs[0])
    assert run_passes(model, "move_activation_scales")[0].fired == 4 * PRODUCTS - 1


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_one_product_rounds_to_the_same_codes(compute):
    """``(q(x/s)*s) @ W`` in numpy and ml_dtypes, beside the graph before and after."""
    dtype = COMPUTE_TYPES[compute]
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["t", 64]))
    w = np.random.default_rng(0).standard_normal((64, 16)).astype(dtype.numpy())
    b = Builder()
    weight = b.constant(w, dtype.numpy())
    y = b.op("MatMul", round_per_token(b, x, 64, compute), weight, name="product")
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["t", 16])
    model = ir.Model(ir.Graph([x], [y], nodes=b.nodes, opset_imports={"": 23}, name="g"), ir_version=11)
    feeds = {"x": (np.random.default_rng(1).standard_normal((40, 64)) * 3).astype(dtype.numpy())}
    feeds["x"][7] = 0  # a token of zeros has a scale, too
    before = run(session_of(model), feeds)["y"].numpy()
    assert run_passes(model, "move_activation_scales")[0].fired == 1
    after = run(session_of(model), feeds)["y"].numpy()
    wide = feeds["x"].astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=1, keepdims=True), np.float32(1e-12)) / np.float32(448)
    codes = (wide / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = (codes * scale) @ w.astype(np.float64)
    for actual in (before, after):
        assert relative_error(actual, expected) <= (1e-6 if compute == "float32" else 2e-3)
