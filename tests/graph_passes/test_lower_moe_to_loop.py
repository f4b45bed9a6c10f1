"""Experts in a loop: every token through the experts that it chose, from packed weights, however tokens are spread."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.lazy import Constant
from l4convert.frontend.builder import Builder, initializer
from l4convert.frontend.compute import COMPUTE_TYPES
from l4convert.graph_passes import fuse_experts, lower_moe_to_loop
from l4convert.graph_passes.editing import attributes_of
from l4convert.plugins.moe.definition import DOMAIN, OP_TYPE, MoESpec
from l4convert.quantization.recipe import Scheme, load_recipe
from l4convert.runtime.ort_values import as_float32
from tests.graph_passes.mutations import insert_after
from tests.graph_passes.rounding import everything, recipe
from tests.graphs import canonical, op_counts, outputs, relative_error, run_passes, snapshot
from tests.in_place import run, session_of

E, H, INTER = 4, 32, 32
INT4, FP8 = Scheme("int4", 32, "absmax"), Scheme("fp8")
RECIPES = {
    "none": load_recipe("none"),
    "int4": everything(INT4),
    "fp8 weights": everything(FP8),
    "fp8": load_recipe("fp8"),
}
CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")


@pytest.mark.parametrize(
    ("layout", "name", "fired"),
    [("scout", "none", 4), ("top-2", "int4", 4), ("maverick", "fp8 weights", 2), ("top-2", "fp8", 4)],
)
def test_every_layers_experts_become_a_loop_that_computes_the_same(layouts, layout, name, fired):
    checkpoint, rules = layouts[layout], RECIPES[name]
    model = canonical(checkpoint)
    run_passes(model, *CANONICAL, recipe=rules)
    expected = outputs(model, checkpoint.config, optimize=False)
    (report,) = run_passes(model, "lower_moe_to_loop")
    assert (report.fired, report.skipped) == (fired, ())
    assert op_counts(model)["Loop"] == fired
    assert not any(key[1] == "MoE" for key in model.functions)
    assert relative_error(outputs(model, checkpoint.config, optimize=False), expected) <= 1e-5
    before = snapshot(model)
    (again,) = run_passes(model, "lower_moe_to_loop")
    assert (again.fired, again.skipped) == (0, ())
    assert snapshot(model) == before


# One layer of experts, whose routing is an input.


def weights(hidden=H, width=INTER):
    rng = np.random.default_rng(3)
    shapes = {"gate_up": (E, hidden, 2 * width), "down": (E, width, hidden)}
    return {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}


def experts(top_k=1, scheme=None, compute="float32", hidden=H, width=INTER):
    """``(x [T,H], logits [T,E]) -> y [T,H]`` by a call of l4convert::MoE over weights of a scheme."""
    spec = MoESpec(E, hidden, width, top_k, compute=compute)
    kind = COMPUTE_TYPES[compute]
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["t", hidden]))
    logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["t", E]))
    stored = [
        initializer(f"experts.{name}_proj", Constant(array.astype(kind.numpy())))
        for name, array in weights(hidden, width).items()
    ]
    b = Builder()
    graph = ir.Graph([x, logits], [], nodes=[], initializers=stored, opset_imports={"": 23}, name="experts")
    model = ir.Model(graph, ir_version=11)
    overload = fuse_experts.declare(model, spec)
    inputs = [x, logits, *stored]
    (y,) = b.node(OP_TYPE, inputs, name="moe", domain=DOMAIN, overload=overload, **attributes_of(spec))
    y.name, y.type, y.shape = "y", ir.TensorType(kind), ir.Shape(["t", hidden])
    graph.extend(b.nodes)
    graph.outputs.append(y)
    if scheme is not None:
        run_passes(model, "quantize_weights", recipe=recipe(("experts.*", scheme)))
    return model


def by_hand(x, logits, top_k):
    """transformers' Llama4TextMoe without the shared expert, row by row in float64."""
    gate_up, down = (array.astype(np.float64) for array in weights().values())
    y = np.zeros(x.shape)
    for token, row in enumerate(x.astype(np.float64)):
        for expert in np.argsort(-logits[token], kind="stable")[:top_k]:
            scaled = row / (1 + np.exp(-logits[token, expert].astype(np.float64)))
            gate, up = np.split(scaled @ gate_up[expert], 2)
            y[token] += (gate / (1 + np.exp(-gate)) * up) @ down[expert]
    return y


def lowered(model):
    (report,) = run_passes(model, "lower_moe_to_loop")
    assert (report.fired, report.skipped) == (1, ())
    return session_of(model)


def compute(session, x, logits):
    return run(session, {"x": x, "logits": logits})["y"].numpy()


def routed(chosen):
    """Logits by which each token chooses these experts, the first one most."""
    rng = np.random.default_rng(len(chosen))
    logits = rng.uniform(-2, -1, (len(chosen), E))
    for token, order in enumerate(chosen):
        for rank, expert in enumerate(order):
            logits[token, expert] = 3 - rank - rng.uniform(0, 0.5)
    return logits.astype(np.float32)


@pytest.fixture(scope="module", params=[(1, 3), (2, 3), (1, 64), (2, 64)], ids=str)
def small_tiles(request):
    """(top_k, a session whose least tile is so long)."""
    top_k, tile = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower_moe_to_loop, "LEAST_TILE", tile)
        return top_k, lowered(experts(top_k))


@settings(max_examples=25)
@given(orders=st.lists(st.permutations(range(E)), min_size=1, max_size=40))
def test_any_choice_of_experts_gives_what_the_formula_gives(small_tiles, orders):
    top_k, session = small_tiles
    logits = routed([order[:top_k] for order in orders])
    x = np.random.default_rng(1).standard_normal((len(orders), H)).astype(np.float32)
    expected = by_hand(x, logits, top_k)
    assert relative_error(compute(session, x, logits), expected) <= 1e-5


@pytest.mark.parametrize("expert", [0, E - 1])
@pytest.mark.parametrize("tokens", [1, 3, 64, 65, 200])
def test_all_tokens_may_choose_one_expert(small_tiles, expert, tokens):
    top_k, session = small_tiles
    logits = routed([[expert, (expert + 1) % E][:top_k]] * tokens)
    x = np.random.default_rng(2).standard_normal((tokens, H)).astype(np.float32)
    assert relative_error(compute(session, x, logits), by_hand(x, logits, top_k)) <= 1e-5


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", [None, INT4, FP8], ids=["none", "int4", "fp8"])
def test_16_bits_give_the_definitions_bits_nearly(kind, scheme):
    """Sums are in the same order in both forms: what differs is which products ONNX Runtime does at once."""
    model = experts(2, scheme, kind)
    dtype = COMPUTE_TYPES[kind].numpy()
    x = np.random.default_rng(0).standard_normal((70, H)).astype(dtype)
    logits = np.random.default_rng(1).standard_normal((70, E)).astype(np.float32)
    feeds = {"x": x, "logits": logits}
    expected = as_float32(run(session_of(model), feeds)["y"])
    actual = as_float32(run(lowered(model), feeds)["y"])
    assert relative_error(actual, expected) <= 2 * float(ml_dtypes.finfo(dtype).eps)


def test_an_expert_is_gathered_in_words_of_the_stored_bytes():
    for scheme, suffix, codes in ((INT4, "int4", 8), (FP8, "fp8", 4)):
        model = experts(1, scheme)
        names = [f"experts.{n}_proj_{suffix}" for n in ("gate_up", "down")]
        before = {name: model.graph.initializers[name].const_value.tobytes() for name in names}
        lowered(model)
        words = {name: model.graph.initializers[f"{name}_packed"].const_value for name in names}
        assert all(tensor.dtype == ir.DataType.INT32 for tensor in words.values())
        assert {name: tensor.tobytes() for name, tensor in words.items()} == before
        assert words[names[0]].shape == (E, H, 2 * INTER // codes)
        assert not before.keys() & model.graph.initializers.keys()  # not stored twice


def test_weights_that_are_computed_are_left_with_the_reason(scout):
    model = canonical(scout)
    run_passes(model, *CANONICAL)
    insert_after(model, "layers.0/feed_forward/experts/model.layers.0.feed_forward.experts.down_proj/cast", "Neg")
    expected = outputs(model, scout.config)
    (report,) = run_passes(model, "lower_moe_to_loop")
    assert report.fired == 3
    assert report.skipped == (("layers.0/feed_forward/experts/moe", "the experts' weights are not stored tensors"),)
    assert relative_error(outputs(model, scout.config), expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "most", "reason"),
    [
        ({}, E * H * 2 * INTER - 1, "experts.gate_up_proj has more than 8191 elements"),
        ({"scheme": INT4}, 1023, "experts.gate_up_proj_int4 has more than 1023 words"),
        ({"scheme": INT4, "width": 6}, None, "gate_up_proj_int4 is 32 x 12: its rows do not fill words of 8 codes"),
        ({"scheme": INT4, "width": 48}, None, "down_proj_int4 is 48 x 32: .* blocks of 32"),
        ({"scheme": FP8, "hidden": 34}, None, "down_proj_fp8 is 32 x 34: its rows do not fill words of 4 codes"),
    ],
)
def test_what_does_not_fit_is_left_with_the_reason(monkeypatch, options, most, reason):
    if most is not None:
        monkeypatch.setattr(lower_moe_to_loop, "MOST_ELEMENTS", most)
    model = experts(1, **options)
    before = snapshot(model)
    (report,) = run_passes(model, "lower_moe_to_loop")
    assert report.fired == 0
    ((where, why),) = report.skipped
    assert where == "moe"
    assert re.search(reason, why), why
    assert snapshot(model) == before


@pytest.fixture(scope="module", params=[8, 4])
def unpacking(request):
    b = Builder()
    words = ir.Value(name="words", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["k", "n"]))
    codes = lower_moe_to_loop.unpack_words(b, words, request.param)
    codes.name, codes.type = "codes", ir.TensorType(ir.DataType.INT32)
    codes.shape = ir.Shape(["k", "n", 2, request.param // 2])
    graph = ir.Graph([words], [codes], nodes=b.nodes, opset_imports={"": 23}, name="unpack")
    return request.param, session_of(ir.Model(graph, ir_version=11))


EXTREMES = [0, 1, -1, 2**31 - 1, -(2**31), -(2**31) + 1, 0x7FFF, 0x8000, -0x8000, 0xFFFF, 0x10000, -0x10000, -0x10001]


@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.sampled_from(EXTREMES), min_size=1, max_size=64))
def test_words_are_unpacked_as_numpy_sees_their_bytes(unpacking, numbers):
    codes, session = unpacking
    words = np.array([numbers], np.int32)
    stored = words.view(np.uint8).reshape(1, len(numbers), 4)
    if codes == 8:
        stored = np.stack([stored & 15, stored >> 4], axis=-1)
    expected = stored.reshape(1, len(numbers), 2, codes // 2)
    assert np.array_equal(run(session, {"words": words})["codes"].numpy(), expected)
