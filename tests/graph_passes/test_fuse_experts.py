"""Experts are fused from both of their forms, and only where they are the definition."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.combiners import cast
from l4convert.checkpoint.lazy import Constant
from tests.checkpoints import write_random_checkpoint
from tests.graph_passes.mutations import constant, insert_after, node, replace_input
from tests.graphs import canonical, op_counts, outputs, relative_error, run_passes, snapshot

FIRED = {
    "scout": 4,
    "maverick": 2,
    "top-2": 4,
    "unfused": 4,
    "unfused maverick, top-2": 2,
    "tied with biases": 4,
}
E = "layers.0/feed_forward/experts"


@pytest.mark.parametrize("layout", FIRED)
def test_every_layers_experts_become_one_call_that_computes_the_same(layouts, layout):
    checkpoint = layouts[layout]
    model = canonical(checkpoint)
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "fuse_experts")
    assert (report.fired, report.skipped) == (FIRED[layout], ())
    assert op_counts(model)["MoE"] == FIRED[layout]
    assert "TopK" not in op_counts(model)
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5
    before = snapshot(model)
    (again,) = run_passes(model, "fuse_experts")
    assert (again.fired, again.skipped) == (0, ())
    assert snapshot(model) == before


def test_both_forms_become_the_same_weights(scout, unfused):
    """The same seed made both checkpoints."""
    one, other = canonical(scout), canonical(unfused)
    for model in (one, other):
        run_passes(model, "fuse_experts")
    assert set(one.graph.initializers) == set(other.graph.initializers)
    for name, value in one.graph.initializers.items():
        left, right = value.const_value, other.graph.initializers[name].const_value
        assert left.dtype == right.dtype
        assert np.array_equal(left.numpy(), right.numpy()), name


def test_one_expert_in_unfused_form(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, unfused=True, num_local_experts=1))
    model = canonical(checkpoint)
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "fuse_experts")
    assert report.fired == 4
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5


def test_the_pass_reads_no_weight(unfused, monkeypatch):
    def unreadable(self, batch, rows, cols):
        raise AssertionError(f"{self.name} was read")

    model = canonical(unfused)
    for value in model.graph.initializers.values():
        if not isinstance(value.const_value, Constant):
            monkeypatch.setattr(type(value.const_value), "tile", unreadable)
    assert run_passes(model, "fuse_experts")[0].fired == 4


def _gate_and_up_swapped(model):
    gate, up = node(model, f"{E}/Split").outputs
    for name in ("Mul_1", "Sigmoid_1"):
        replace_input(model, f"{E}/{name}", 0, up)
    replace_input(model, f"{E}/Mul_2", 1, gate)


def _score_on_the_output(model):
    replace_input(model, f"{E}/MatMul", 0, node(model, f"{E}/Unsqueeze_1").outputs[0])
    insert_after(model, f"{E}/MatMul_1", "Mul", node(model, f"{E}/Unsqueeze").outputs[0])
    model.graph.remove(node(model, f"{E}/Mul"), safe=True)


def _softmax(model):
    node(model, f"{E}/Sigmoid").op_type = "Softmax"


def _mean(model):
    """The search goes on to the experts of layer 1, which are not this layer's."""
    node(model, f"{E}/ReduceSum").op_type = "ReduceMean"


def _extra_op(model):
    insert_after(model, f"{E}/Split", "Tanh")


def _computed_weights(model):
    insert_after(model, f"{E}/model.layers.0.feed_forward.experts.down_proj/cast", "Neg")


def _choice_rounded(model):
    insert_after(model, f"{E}/TopK", "Identity", output=1)


def _no_scatter(model):
    scores = ir.Node("", "Sigmoid", [node(model, "layers.0/feed_forward/router").outputs[0]], num_outputs=1, name="all")
    scores.outputs[0].name = "all"
    model.graph.insert_before(node(model, f"{E}/Transpose"), scores)
    replace_input(model, f"{E}/Transpose", 0, scores.outputs[0])


def _number_of_experts_computed(model):
    k = ir.Node("", "Abs", [constant(model, [1], np.int64)], num_outputs=1, name="k")
    k.outputs[0].name = "k"
    model.graph.insert_before(node(model, f"{E}/TopK"), k)
    replace_input(model, f"{E}/TopK", 1, k.outputs[0])


STACKED: dict[Callable[[ir.Model], None], str] = {
    _gate_and_up_swapped: f"Split {E}/Split:0 stands where a Split should",
    _score_on_the_output: f"Mul {E}/MatMul_1/extra stands where a MatMul should",
    _softmax: f"Softmax {E}/Sigmoid stands where a Sigmoid should",
    _mean: f"{E}/ScatterElements leads to other experts than its own, those of layers.1/feed_forward/router",
    _extra_op: f"{E}/Split",
    _computed_weights: "the experts' weights are not stored tensors",
    _choice_rounded: "the chosen logits are not scattered into a table of scores",
    _no_scatter: f"{E}/ScatterElements does not lead to ReduceSum",
    _number_of_experts_computed: "the chosen logits are not scattered into a table of scores",
}


def _expert_used_twice(model):
    replace_input(model, f"{E}/Gather_2", 1, node(model, f"{E}/Gather_1").inputs[1])


def _expert_left_out(model):
    node(model, f"{E}/Add_2").outputs[0].replace_all_uses_with(node(model, f"{E}/Add_1").outputs[0])
    for name in ("Add_2", "MatMul_11", "Mul_11", "Mul_10", "Sigmoid_4", "MatMul_10", "MatMul_9", "Mul_9", "Gather_3"):
        model.graph.remove(node(model, f"{E}/{name}"), safe=True)


def _unequal_dtypes(model):
    value = model.graph.initializers["model.layers.0.feed_forward.experts.2.up_proj.weight"]
    value.const_value = cast(value.const_value, ir.DataType.FLOAT16)
    value.dtype = ir.DataType.FLOAT16


def _unequal_widths(model):
    """Expert 2 has half the width: what is left of it is still a good expert."""
    for name, axis in (("gate", 1), ("up", 1), ("down", 0)):
        value = model.graph.initializers[f"model.layers.0.feed_forward.experts.2.{name}_proj.weight"]
        half = value.const_value.numpy()[tuple(slice(0, 32) if a == axis else slice(None) for a in range(2))]
        value.const_value = Constant(np.array(half), value.name)
        value.shape = ir.Shape(half.shape)


def _gate_and_up_exchanged_in_one(model):
    gate, up = (node(model, f"{E}/{name}").outputs[0] for name in ("MatMul_3", "MatMul_4"))
    for name in ("Mul_4", "Sigmoid_2"):
        replace_input(model, f"{E}/{name}", 0, up)
    replace_input(model, f"{E}/Mul_5", 0, gate)
    replace_input(model, f"{E}/Mul_5", 1, node(model, f"{E}/Mul_4").outputs[0])


def _one_without_gate(model):
    replace_input(model, f"{E}/MatMul_5", 0, node(model, f"{E}/MatMul_4").outputs[0])


def _computed_matrix(model):
    insert_after(model, f"{E}/model.layers.0.feed_forward.experts.1.down_proj.weight/cast", "Neg")


UNFUSED: dict[Callable[[ir.Model], None], str] = {
    _expert_used_twice: "has other attributes or another value",
    _expert_left_out: "3 of the router's 4 experts are summed",
    _unequal_dtypes: "the experts' weights are of different dtypes or shapes",
    _unequal_widths: "the experts' weights are of different dtypes or shapes",
    _gate_and_up_exchanged_in_one: f"Mul {E}/Mul_4 stands where a MatMul should",
    _one_without_gate: f"MatMul {E}/MatMul_4 stands where a Mul should",
    _computed_matrix: "experts.1.down_proj.weight/cast/extra is not a stored matrix",
}


@pytest.mark.parametrize("mutation", [*STACKED, *UNFUSED], ids=lambda f: f.__name__.strip("_"))
def test_what_is_not_the_definition_is_left_alone_with_the_reason(scout, unfused, mutation):
    checkpoint, reasons = (scout, STACKED) if mutation in STACKED else (unfused, UNFUSED)
    model = canonical(checkpoint)
    mutation(model)
    expected = outputs(model, checkpoint.config)
    (report,) = run_passes(model, "fuse_experts")
    assert report.fired == 3
    ((where, why),) = report.skipped
    assert where == f"{E}/TopK"
    assert reasons[mutation] in why
    assert op_counts(model)["MoE"] == 3
    assert relative_error(outputs(model, checkpoint.config), expected) <= 1e-5


def test_float32_experts_need_no_cast(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, unfused=True, dtype="float32"))
    model = canonical(checkpoint)
    run_passes(model, "fuse_experts")
    assert "Cast" not in {n.op_type for n in model.graph if "experts" in (n.name or "")}
    stacked = model.graph.initializers["model.layers.0.feed_forward.experts.gate_up_proj"].const_value
    assert stacked.numpy().dtype == np.float32
    assert stacked.numpy().dtype != ml_dtypes.bfloat16
    gate = checkpoint.tensors["model.layers.0.feed_forward.experts.3.gate_proj.weight"].numpy()
    assert np.array_equal(stacked.numpy()[3, :, :64], gate.T)
