"""Where a step's time goes, of real steps under ONNX Runtime's profiler."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from l4convert.bench import ours
from l4convert.bench.kinds import KINDS, NodeKinds, mask_nodes
from l4convert.bench.sweep import Sweep
from l4convert.bench.trace import read_trace
from l4convert.pipeline import ConvertOptions, convert
from l4convert.progress import NO_PROGRESS
from l4convert.runtime import ON_CPU, OrtSession, read_artifact
from tests.artifacts import KV_CACHES

STEPS = 4


@pytest.fixture(scope="module")
def profile(lowered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a prompt of two chunks and some tokens."""
    session = OrtSession.open(lowered, max_length=40, threads=1, profile=tmp_path_factory.mktemp("profile") / "trace")
    stream = session.start(1)
    for size in (8, 8, *[1] * STEPS):
        stream.step(np.full((1, size), 5))
    return session.end_profile()


def test_nothing_is_counted_twice(profile: Path, lowered: Path) -> None:
    """The attention of this artifact is in branches of If, whose time covers what is in them."""
    calls = read_trace(profile)
    assert len(calls) == 2 + STEPS
    events = [event for event in json.loads(profile.read_text()) if event["cat"] == "Node"]
    assert any(event["args"]["op_name"] == "If" for event in events)
    assert all(call.between >= 0 for call in calls)
    naive = sum(event["dur"] for event in events if event["name"].endswith("_kernel_time")) / 1e6
    found = ours.breakdown(calls, NodeKinds.of(read_artifact(lowered)))
    assert sum(sum(call.nodes.values()) for call in calls) < naive
    assert sum(found.parts_ms.values()) == pytest.approx(found.total_ms)
    assert tuple(found.parts_ms) == KINDS
    assert all(found.parts_ms[kind] > 0 for kind in KINDS)


def test_every_operator_is_of_the_kind_that_its_name_says(profile: Path, lowered: Path) -> None:
    kinds = NodeKinds.of(read_artifact(lowered))
    operators = {kind: set() for kind in KINDS}  # type: dict[str, set[str]]
    for event in json.loads(profile.read_text()):
        if event["cat"] == "Node":
            operators[kinds.of_node(event["name"].removesuffix("_kernel_time"))].add(event["args"]["op_name"])
    assert "GroupQueryAttention" in operators["global attention"]
    assert {"GroupQueryAttention", "RotaryEmbedding", "If"} <= operators["chunked attention"]
    assert "CumSum" in operators["positions and masks"]
    assert operators["projections"] == {"MatMul"}
    assert "MoE" in operators["feed-forward"]
    assert "MatMul" in operators["head"]
    heavy = {"MatMul", "MoE", "GroupQueryAttention", "Attention", "RotaryEmbedding"}
    assert not heavy & (operators["other"] | operators["positions and masks"])


@pytest.mark.parametrize("form", KV_CACHES)
def test_names_of_graphs_that_were_not_lowered(form: str, artifacts: dict[str, Path]) -> None:
    kinds = NodeKinds.of(read_artifact(artifacts[form]))
    graph = onnx.load(artifacts[form] / "model.onnx", load_external_data=False).graph
    attention = {kinds.of_node(n.name): n.name for n in graph.node if n.op_type == "Attention"}
    assert set(attention) == {"global attention", "chunked attention"}
    assert attention["global attention"].startswith("layers.3/")
    others = {re.sub(r"\d+", "", n.name.split("/")[-1]) for n in graph.node if kinds.of_node(n.name) == "other"}
    assert {"residual", "input_layernorm", "post_attention_layernorm", "embed_tokens"} <= others
    assert not others & {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "router"}


def test_nodes_of_inlined_functions_belong_to_the_block_before_them(
    scout_layout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Those of target portable have no names of their own."""
    out = tmp_path_factory.mktemp("bench") / "portable"
    convert(ConvertOptions(checkpoint=scout_layout, output=out, recipe="int4", target="portable", block_size=32))
    kinds = NodeKinds.of(read_artifact(out))
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node:
        found[kinds.of_node(node.name)].add(node.op_type)
    assert "Attention" in found["global attention"] & found["chunked attention"]
    assert {"MatMul", "DequantizeLinear"} <= found["projections"] & found["feed-forward"]
    assert not {"MatMul", "DequantizeLinear", "Attention"} & found["other"]


def test_masks_are_what_no_token_reaches() -> None:
    def tensor(name: str, rank: int = 1) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None] * rank)

    branch = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Neg", ["counted"], ["inside"], name="branch mask"),
            onnx.helper.make_node("Add", ["inside", "input_ids"], ["result"], name="branch text"),
        ],
        "branch",
        [],
        [tensor("result")],
    )
    nodes = [
        onnx.helper.make_node("Neg", ["weight"], ["folded"], name="weights"),
        onnx.helper.make_node("CumSum", ["attention_mask", "weight"], ["counted"], name="mask"),
        onnx.helper.make_node("Shape", ["input_ids"], ["shape"], name="shape"),
        onnx.helper.make_node("Add", ["shape", "folded"], ["more"], name="shape and weights"),
        onnx.helper.make_node("Add", ["input_ids", "counted"], ["both"], name="text"),
        onnx.helper.make_node("If", ["more"], ["chosen"], name="if", then_branch=branch, else_branch=branch),
    ]
    inputs = [tensor("input_ids"), tensor("attention_mask")]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, [tensor("chosen")])
    assert list(mask_nodes(onnx.helper.make_model(graph))) == [
        "mask",
        "shape",
        "shape and weights",
        "branch mask",
        "branch mask",
    ]


def test_a_profile_of_every_length(lowered: Path) -> None:
    plan = Sweep(read_artifact(lowered).config, (16, 40), STEPS, False)
    with NO_PROGRESS.task("") as task:
        found = ours.profile(ours.Order(lowered, ON_CPU, 1, plan), task)
    assert [one.steps for one in found] == [2, 2]  # one of four is warm-up, and the faster half of the rest counts
    for one in found:
        assert sum(one.parts_ms.values()) == pytest.approx(one.total_ms)
        assert one.parts_ms["global attention"] > 0
