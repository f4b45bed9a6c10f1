"""Passes on graphs that torch.onnx exported: each fires, fires once, and gives a reason where it does not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from l4convert.graph_passes import CANONICAL_PASSES, NORMALIZING_PASSES
from l4convert.graph_passes.reading import ints_of
from l4convert.onnx_in import open_onnx
from tests.exports import FOLDER
from tests.graphs import KEEP, op_counts, relative_error, run_passes, snapshot

NAMES = [row.name for row in NORMALIZING_PASSES]
# Two layers, one with experts, whose router and shared expert are Gemm. Norms: two a layer, the last, two of heads.
FIRED = {
    "upgrade_opset": 1,
    "normalize_linear": 4,
    "normalize_norms": 7,
    "outline_exported_attention": 2,
    "normalize_experts": 1,
}
# torch writes five of the norms as RMSNormalization itself, and attention as Attention.
OF_OPSET_23 = {**FIRED, "upgrade_opset": 0, "normalize_norms": 2}


def exported(name: str = "eager") -> ir.Model:
    model = open_onnx(FOLDER / f"{name}.onnx").model
    if "bfloat16" in name:
        model.graph.metadata_props["l4convert.compute"] = "bfloat16"
    return model


def feeds(model: ir.Model, kind: str) -> dict[str, np.ndarray]:
    """21 new tokens of two rows, after 9 of a past where there are caches: they cross two chunk boundaries."""
    rng = np.random.default_rng(3)
    past = 9 if len(model.graph.inputs) > 2 else 0
    mask = np.ones((2, past + 21), np.int64)
    if kind == "padded":
        mask[0, :5] = 0
    if kind == "holes":
        mask = (rng.random(mask.shape) < 0.7).astype(np.int64)
    given = {"input_ids": rng.integers(0, 64, (2, 21)), "attention_mask": mask}
    for value in model.graph.inputs[2:]:
        given[str(value.name)] = rng.standard_normal((2, 2, past, 8)).astype(np.float32)
    return given


def run_proto(data: bytes, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, given)
    return outputs


@cache
def expected(name: str, kind: str) -> list[np.ndarray]:
    return run_proto((FOLDER / f"{name}.onnx").read_bytes(), feeds(exported(name), kind))


@pytest.mark.parametrize("kind", ["plain", "padded", "holes"])
@pytest.mark.parametrize(("name", "counts"), [("eager", FIRED), ("sdpa-cache", FIRED), ("opset23-cache", OF_OPSET_23)])
def test_the_canonical_graph_computes_what_the_exported_one_does(name, counts, kind):
    model = exported(name)
    fired = {report.name: report.fired for report in run_passes(model, *NAMES)}
    assert {row: fired[row] for row in FIRED} == counts
    given = feeds(model, kind)
    actual = run_proto(snapshot(model), given)
    real = given["attention_mask"][:, -21:] > 0
    assert relative_error(actual[0][real], expected(name, kind)[0][real]) <= 2e-6
    if kind == "plain":  # in rows of padding caches hold what no token sees
        for one, other in zip(actual[1:], expected(name, kind)[1:], strict=True):
            assert relative_error(one, other) <= 2e-6


def test_only_calls_products_and_rotation_are_left():
    model = exported("sdpa-cache")
    run_passes(model, *NAMES, *(row.name for row in CANONICAL_PASSES[:2]))
    counts = op_counts(model)
    assert (counts["LongContextAttention"], counts["MoE"], counts["RMSNormalization"]) == (2, 1, 7)
    assert not {"Softmax", "Gemm", "ReduceMean", "Sqrt", "TopK", "Tile", "ScatterElements"} & counts.keys()


def test_bfloat16_norms_and_experts_lose_their_casts():
    model = exported("sdpa-bfloat16")
    before = op_counts(model)["Cast"]
    fired = {report.name: report.fired for report in run_passes(model, *NAMES)}
    assert {row: fired[row] for row in FIRED} == FIRED
    assert op_counts(model)["Cast"] < before
    (norm, *_) = [n for n in model.graph if n.op_type == "RMSNormalization"]
    assert norm.inputs[0].dtype == ir.DataType.BFLOAT16


@pytest.mark.parametrize("position", range(len(NAMES)))
def test_a_second_run_of_each_pass_changes_nothing(position):
    model = exported("sdpa-cache")
    run_passes(model, *NAMES[: position + 1])
    before = snapshot(model)
    (report,) = run_passes(model, NAMES[position])
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_weights_have_the_names_of_transformers():
    model = exported("sdpa-cache")  # a wrapper's: "decoder.model.layers.0..."; transposed ones have numbers
    run_passes(model, "name_weights")
    names = {name for name, value in model.graph.initializers.items() if len(value.shape) > 1}
    linear = [f"self_attn.{x}_proj" for x in "qkvo"] + ["feed_forward.shared_expert.up_proj", "feed_forward.router"]
    assert {f"model.layers.0.{x}.weight" for x in linear} < names
    assert {"model.layers.0.feed_forward.experts.gate_up_proj", "lm_head.weight", "model.embed_tokens.weight"} < names
    assert not [name for name in names if name.startswith(("val_", "decoder."))]


def test_a_name_that_two_weights_want_is_given_to_none():
    model = exported("sdpa-cache")
    (q,) = [n for n in model.graph if "'decoder.model.layers.1.self_attn.q_proj'" in str(n.metadata_props)]
    q.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'decoder.lm_head', 'linear']"
    (report,) = run_passes(model, "name_weights")
    assert [reason for _, reason in report.skipped] == ["another tensor is called lm_head.weight"]


def test_names_of_nodes_tell_modules_where_there_is_no_metadata():
    model = exported("eager")
    for node in model.graph:
        node.metadata_props.clear()
        if node.op_type == "MatMul" and node.name == "node_linear":
            node.name = "/model/layers.0/self_attn/q_proj/MatMul"
    run_passes(model, "name_weights")
    assert "model.layers.0.self_attn.q_proj.weight" in model.graph.initializers


def _by_type(model: ir.Model, op_type: str, number: int = 0) -> ir.Node:
    return [n for n in model.graph if n.op_type == op_type][number]


def _set(model: ir.Model, value: ir.Value | None, number: float) -> None:
    """Give one use of a constant another value."""
    assert value is not None
    array = value.const_value.numpy()  # type: ignore[union-attr]
    value.const_value = ir.tensor(np.full_like(array, number), name=value.name)


def _largest(model):
    _by_type(model, "TopK").attributes.add(ir.AttrInt64("largest", 0))


def _filled_with_zeros(model):
    scatter = _by_type(model, "ScatterElements")
    _set(model, scatter.inputs[0].producer().inputs[0], 0.0)


def _gate_second(model):
    split = _by_type(model, "Split")
    gate, up = split.outputs
    users = [(n, i, other) for value, other in ((gate, up), (up, gate)) for n, i in value.uses()]
    for node, index, other in users:
        node.replace_input_with(index, other)


def _sum_that_keeps_its_axis(model):
    node = [n for n in model.graph if n.op_type == "ReduceSum"][-1]
    node.attributes.add(ir.AttrInt64("keepdims", 1))


def _other_divisor(model):
    div = _by_type(model, "Div")
    constant = ir.Value(name="other", const_value=ir.tensor(np.asarray(4, np.int64), name="other"))
    model.graph.initializers["other"] = constant
    div.replace_input_with(1, constant)


def _window(model):
    """Keys less than 4096 tokens away only: no small call shows it."""
    compare = _by_type(model, "LessOrEqual")
    users = list(compare.outputs[0].uses())
    b = ir.Node("", "Sub", [compare.inputs[1], _stored(model, 4096)], num_outputs=1, name="window/start")
    c = ir.Node("", "Greater", [compare.inputs[0], b.outputs[0]], num_outputs=1, name="window")
    d = ir.Node("", "And", [compare.outputs[0], c.outputs[0]], num_outputs=1, name="both")
    model.graph.insert_after(compare, [b, c, d])
    for node, index in users:
        node.replace_input_with(index, d.outputs[0])


def _strict(model):
    _by_type(model, "LessOrEqual").op_type = "Less"


def _small_penalty(model):
    for where in [n for n in model.graph if n.op_type == "Where"]:
        _set(model, where.inputs[2], -3.0)


def _position_ids(model):
    ids = ir.Value(name="cache_position", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["s", "t"]))
    model.graph.inputs.append(ids)
    compare = _by_type(model, "LessOrEqual")
    extra = ir.Node("", "Add", [compare.inputs[0], ids], num_outputs=1, name="shifted")
    model.graph.insert_before(compare, extra)
    compare.replace_input_with(0, extra.outputs[0])


def _other_scale(model):
    softmax = _by_type(model, "Softmax")
    _set(model, softmax.inputs[0].producer().inputs[0].producer().inputs[1], 0.5)


def _other_softmax(model):
    for node in [n for n in model.graph if n.op_type == "Softmax"]:
        node.attributes.add(ir.AttrInt64("axis", 1))


def _mean_over_another_axis(model):
    _set(model, _by_type(model, "ReduceMean").inputs[1], 1)


def _cube(model):
    _set(model, _by_type(model, "Pow").inputs[1], 3.0)


def _scaled_gemm(model):
    _by_type(model, "Gemm").attributes.add(ir.AttrFloat32("alpha", 2.0))


def _stored(model: ir.Model, number: int) -> ir.Value:
    value = ir.Value(name=f"stored_{number}", const_value=ir.tensor(np.asarray(number, np.int64)))
    model.graph.initializers[value.name] = value
    return value


REASONS: list[tuple[str, Callable[[ir.Model], None], str]] = [
    ("normalize_experts", _largest, "smallest logits"),
    ("normalize_experts", _filled_with_zeros, "a score that is not 0"),
    ("normalize_experts", _gate_second, "first and second half"),
    ("normalize_experts", _sum_that_keeps_its_axis, "not over the experts"),
    ("outline_exported_attention", _other_divisor, "divided by different numbers: [4, 8]"),
    ("outline_exported_attention", _window, "depends on the number 4096"),
    ("outline_exported_attention", _strict, "neither a causal mask nor one of chunks"),
    ("outline_exported_attention", _small_penalty, "does not add 0 or a large negative number"),
    ("outline_exported_attention", _position_ids, "cache_position"),
    ("outline_exported_attention", _other_scale, "not by 1/sqrt(8)"),
    ("outline_exported_attention", _other_softmax, "not over the last axis"),
    ("normalize_norms", _mean_over_another_axis, "not over the last one"),
    ("normalize_norms", _cube, "is not a square"),
    ("normalize_linear", _scaled_gemm, "scales its first operand"),
]


@pytest.mark.parametrize(("name", "change", "reason"), REASONS, ids=[f"{n}{c.__name__}" for n, c, _ in REASONS])
def test_what_does_not_match_is_left_alone_and_told(name, change, reason):
    model = exported()
    change(model)
    before = op_counts(model)
    (report,) = run_passes(model, name)
    assert report.fired < FIRED[name]
    assert any(reason in text for _, text in report.skipped), report.skipped
    for op_type in {"TopK", "Softmax", "Sqrt", "Gemm"} & before.keys():
        if report.fired == 0:
            assert op_counts(model)[op_type] == before[op_type]


def test_attention_of_a_fixed_batch_is_found():
    model = exported("eager")
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, "tokens"])
    shape = ir.Value(name="heads", const_value=ir.tensor(np.asarray([1, 4, -1, 8]), name="heads"))  # as torch writes it
    model.graph.initializers["heads"] = shape
    repeated = [n for n in model.graph if n.op_type == "Reshape" and n.inputs[0].producer().op_type == "Expand"]
    for node in repeated:
        node.replace_input_with(1, shape)
    fired = {report.name: report.fired for report in run_passes(model, *NAMES)}
    assert (len(repeated), fired) == (4, {**fired, **FIRED})
    given = {name: array[:1] for name, array in feeds(model, "holes").items()}
    real = given["attention_mask"] > 0
    wanted = run_proto((FOLDER / "eager.onnx").read_bytes(), given)[0][real]
    assert relative_error(run_proto(snapshot(model), given)[0][real], wanted) <= 2e-6


def test_experts_of_a_fixed_number_of_tokens_are_found():
    """torch folds the table of scores that are minus infinity, and counts its rows."""
    model = exported("eager")
    for node, index, array in (
        (_by_type(model, "ScatterElements"), 0, np.full((42, 4), -np.inf, np.float32)),
        (next(n for n in model.graph if n.op_type == "Reshape" and ints_of(n.inputs[1]) == [-1, 1]), 1, [168, 1]),
    ):
        stored = ir.Value(name=f"folded_{index}", const_value=ir.tensor(np.asarray(array), name=f"folded_{index}"))
        model.graph.initializers[f"folded_{index}"] = stored
        node.replace_input_with(index, stored)
    fired = {report.name: report.fired for report in run_passes(model, *NAMES)}
    assert fired == {**fired, **FIRED}
    assert relative_error(run_proto(snapshot(model), feeds(model, "plain"))[0], expected("eager", "plain")[0]) <= 2e-6


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        (ir.AttrInt64("is_causal", 1), "is_causal=1"),
        (ir.AttrFloat32("softcap", 2.0), "softcap=2"),
        (ir.AttrFloat32("scale", 0.0), "not by 1/sqrt(8)"),
    ],
)
def test_an_attention_that_does_more_is_left_alone(attribute, reason):
    model = exported("opset23-cache")
    _by_type(model, "Attention").attributes.add(attribute)
    (report,) = run_passes(model, "outline_exported_attention")
    assert report.fired == 1
    assert [reason in text for _, text in report.skipped] == [True]


def test_an_operator_that_changed_its_meaning_keeps_the_old_opset():
    model = exported()
    model.graph.opset_imports[""] = 17  # where ReduceMean has its axes in an attribute
    before = snapshot(model)
    (report,) = run_passes(model, "upgrade_opset")
    assert report.fired == 0
    assert ("ReduceMean", "opsets 17 and 23 differ in attribute axes") in report.skipped
    assert snapshot(model) == before


def test_a_newer_opset_stays():
    model = exported()
    model.graph.opset_imports[""] = 24
    (report,) = run_passes(model, "upgrade_opset")
    assert (report.fired, report.skipped, model.graph.opset_imports[""]) == (0, (), 24)


def test_a_division_by_the_root_and_a_square_by_multiplication_are_norms_too():
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6])
    make = onnx.helper.make_node
    nodes = [
        make("Mul", ["x", "x"], ["square"]),
        make("ReduceMean", ["square", "last"], ["mean"]),
        make("Add", ["eps", "mean"], ["more"]),
        make("Sqrt", ["more"], ["root"]),
        make("Div", ["x", "root"], ["y"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.asarray([-1], np.int64), "last"),
        onnx.numpy_helper.from_array(np.asarray(1e-3, np.float32), "eps"),
    ]
    graph = onnx.helper.make_graph(nodes, "norm", [x], [y], constants)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    model = ir.from_proto(proto)
    (report,) = run_passes(model, "normalize_norms")
    assert (report.fired, report.skipped) == (1, ())
    given = {"x": np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)}
    assert op_counts(model) == {"Constant": 1, "RMSNormalization": 1}
    assert relative_error(run_proto(snapshot(model), given)[0], run_proto(proto.SerializeToString(), given)[0]) <= 1e-6


def test_passes_leave_a_graph_without_their_patterns_as_it_is():
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6])
    ])  # fmt: skip
    model = ir.from_proto(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11)
    )
    before = snapshot(model)
    for row in (*NORMALIZING_PASSES, *CANONICAL_PASSES):
        report = row(model, KEEP)
        assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before
