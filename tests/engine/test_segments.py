"""Segments: cut where only the residual stream crosses, and equal to the whole graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from l4convert.engine import BuildOptions, plan_build
from l4convert.engine.jobs import BuildPlan
from l4convert.engine.segment_check import check_segments
from l4convert.engine.segments import Span, cut, split_layers
from l4convert.errors import CheckFailed, InputError, UsageError
from l4convert.progress import NO_PROGRESS


def _plan(out: Path, layers: int) -> BuildPlan:
    return plan_build(BuildOptions(out, ("l4",), max_context=64, prefill_tokens=8, layers_per_engine=layers))


def _names(values: list[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def test_spans_and_their_names() -> None:
    assert [span.name for span in split_layers(48, 20)] == ["layers-00-19", "layers-20-39", "layers-40-47"]
    assert [span.name for span in split_layers(4, None)] == ["decoder"]
    assert Span(99, 101, 200).name == "layers-099-100"
    with pytest.raises(UsageError, match="is not above 0"):
        split_layers(4, 0)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_chain_of_segments_equals_the_whole(scout: Path, layers: int) -> None:
    plan = _plan(scout, layers)
    first, *_, last = plan.segments
    assert _names(list(first.graph.input))[:2] == ["input_ids", "attention_mask"]
    assert _names(list(last.graph.input))[:2] == ["hidden_states", "attention_mask"]
    assert _names(list(first.graph.output))[0] == "hidden_states.next"
    assert _names(list(last.graph.output))[0] == "logits"
    passed = first.graph.output[0].type.tensor_type
    assert passed.elem_type == TensorProto.BFLOAT16
    assert [dim.dim_param or dim.dim_value for dim in passed.shape.dim] == ["batch", "sequence", 64]
    caches = [
        name for segment in plan.segments for name in _names(list(segment.graph.input)) if name.startswith("past")
    ]
    assert caches == [f"past_key_values.{i}.{part}" for i in range(4) for part in ("key", "value")]
    weights = [tensor.name for segment in plan.segments for tensor in segment.graph.initializer]
    shared = {name for name in weights if weights.count(name) > 1}
    assert all(name.startswith("rotary") for name in shared)  # tables that several layers read
    check_segments(plan, NO_PROGRESS)


def test_jobs_have_their_own_caches_and_names(scout: Path) -> None:
    options = BuildOptions(scout, ("l4", "rtx-5090"), max_context=64, layers_per_engine=3, segments=(1,))
    jobs = plan_build(options).jobs
    assert [job.path for job in jobs] == ["engines/l4/layers-03-03.plan", "engines/rtx-5090/layers-03-03.plan"]
    assert jobs[0].inputs["layers"] == [3, 4]
    assert jobs[0].caches_bytes == 2 * 2 * 64 * 16 * 2  # key and value: 2 heads, 64 slots of 16 numbers in 2 bytes


def test_a_wrong_segment_is_found(scout: Path) -> None:
    plan = _plan(scout, 2)
    norm = next(node for node in plan.segments[1].graph.node if node.op_type == "RMSNormalization")
    epsilon = next(attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.5
    with pytest.raises(CheckFailed, match="differs from the whole graph's"):
        check_segments(plan, NO_PROGRESS)


def _toy(extra: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Two layers that add their cache to a residual stream, with its size asked of the token ids."""
    value = helper.make_tensor_value_info
    cache = ["batch", 1, "max_sequence", 4]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h0"]),
        helper.make_node("Shape", ["input_ids"], ["size"], start=-1),
        helper.make_node("Cast", ["size"], ["tokens"], to=TensorProto.FLOAT),
    ]
    for i in range(2):
        nodes += [
            helper.make_node("Add", [f"past_key_values.{i}.key", "tokens"], [f"present.{i}.key"]),
            helper.make_node("Identity", [f"past_key_values.{i}.value"], [f"present.{i}.value"]),
            helper.make_node("ReduceSum", [f"present.{i}.key"], [f"sum{i}"], keepdims=0),
            helper.make_node("Mul", [f"h{i}", f"sum{i}"], [f"scaled{i}"]),
            helper.make_node("Add", [f"h{i}", f"scaled{i}"], [f"h{i + 1}"]),
        ]
    graph = helper.make_graph(
        [*nodes, *extra, helper.make_node("Identity", ["h2"], ["logits"])],
        "toy",
        [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]),
            *(value(f"past_key_values.{i}.{p}", TensorProto.FLOAT, cache) for i in range(2) for p in ("key", "value")),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", "sequence", 4]),
            *(value(f"present.{i}.{p}", TensorProto.FLOAT, cache) for i in range(2) for p in ("key", "value")),
        ],
        [helper.make_tensor("table", TensorProto.FLOAT, [8, 4], [0.5] * 32)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_sizes_of_the_token_ids_are_read_off_the_residual_stream() -> None:
    _, last = cut(_toy([]), split_layers(2, 1))
    assert "input_ids" not in _names(list(last.graph.input))
    shape = next(node for node in last.graph.node if node.op_type == "Shape")
    assert list(shape.input) == ["hidden_states"]
    assert {attribute.name: attribute.i for attribute in shape.attribute} == {"start": 1, "end": 2}
    onnx.checker.check_model(last, full_check=True)


@pytest.mark.parametrize(
    "extra",
    [
        helper.make_node("Add", ["h1", "scaled0"], ["late"]),  # a second value of layer 0
        helper.make_node("Gather", ["table", "input_ids"], ["late"]),  # the token ids
    ],
)
def test_a_graph_in_which_more_crosses_is_not_cut(extra: onnx.NodeProto) -> None:
    model = _toy([extra, helper.make_node("Add", ["late", "h2"], ["unused"])])
    if extra.op_type == "Gather":
        extra.output[0] = "late"
    for node in model.graph.node:
        if node.output[0] == "logits":
            node.input[0] = "unused"
    with pytest.raises(InputError, match="cannot be cut before layer 1: more than one value crosses"):
        cut(model, split_layers(2, 1))
