"""Artifacts for TensorRT as a user makes them: converted and validated by processes of their own, on the nano model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from l4convert import cli
from l4convert.checkpoint import open_checkpoint
from l4convert.quantization.recipe import load_recipe
from l4convert.runtime import OrtSession
from l4convert.runtime import session as session_module
from tests.graphs import lowered, op_counts
from tests.test_end_to_end import run, run_json

# (target, recipe, compute); together they are both targets, both schemes, and a default and another compute type.
WANTED = {"tensorrt-rtx": ("int4", None), "tensorrt": ("fp8", "float32")}

# All that a graph for TensorRT-RTX may hold: operators that its parser was seen to take (docs/adr/0014).
OPERATORS = {
    *("Add", "And", "Attention", "Cast", "Concat", "Constant", "CumSum", "DequantizeLinear", "Div", "Equal", "Expand"),
    *("Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Log", "Loop", "MatMul"),
    *("Max", "Min", "Mod", "Mul", "Neg", "RMSNormalization", "Range", "ReduceMax", "ReduceSum", "Reshape"),
    *("ScatterElements", "ScatterND", "Shape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "TensorScatter"),
    *("TopK", "Transpose", "Unsqueeze", "Where"),
}
FP8_OPERATORS = {"Abs", "QuantizeLinear"}


@pytest.fixture(scope="module")
def artifacts(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Target -> (folder, what convert printed)."""
    made = {}
    for target, (recipe, compute) in WANTED.items():
        out = tmp_path_factory.mktemp("gpu") / target
        more = [] if compute is None else ["--compute", compute]
        made[target] = (out, run_json("convert", nano, "-o", out, "--target", target, "--recipe", recipe, *more))
    return made


@pytest.fixture(scope="module")
def text(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 250 tokens: three chunk boundaries."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((nano.parent / "heldout.txt").read_text(encoding="utf-8")[:700], encoding="utf-8")
    return file


def test_artifacts_pass_validate(artifacts, capsys, nano, text):
    """Exit code 0: within the default policy of the recipe and compute type, over chunk boundaries, in any split."""
    options = ["--reference", str(nano), "--text", str(text), "--json"]
    reports = [json.loads(run("validate", artifacts["tensorrt-rtx"][0], *options).stdout)]
    assert cli.run(["validate", str(artifacts["tensorrt"][0]), *options]) == 0  # here, which is faster
    reports.append(json.loads(capsys.readouterr().out))
    for report in reports:
        assert report["passed"] is True
        assert max(row["boundaries"] for row in report["rows"]) >= 3


@pytest.mark.parametrize(("target", "compute"), [("tensorrt-rtx", "bfloat16"), ("tensorrt", "float32")])
def test_manifests_and_results_say_how_it_computes_and_is_called(artifacts, target, compute):
    out, result = artifacts[target]
    manifest = json.loads((out / "l4convert.json").read_text())
    for said in (result, manifest):
        assert (said["target"], said["kv_cache"], said["compute"]) == (target, "static", compute)
    assert manifest["calls"] == "in_place"


@pytest.mark.parametrize(("target", "kind"), [("tensorrt-rtx", TensorProto.BFLOAT16), ("tensorrt", TensorProto.FLOAT)])
def test_inputs_are_those_of_in_place_caches(artifacts, target, kind):
    graph = onnx.load(artifacts[target][0] / "model.onnx", load_external_data=False).graph
    inputs = {value.name: value.type.tensor_type for value in graph.input}
    outputs = {value.name: value.type.tensor_type for value in graph.output}

    def shape(tensor):
        return [d.dim_param or d.dim_value for d in tensor.shape.dim]

    assert shape(inputs["input_ids"]) == ["batch", "sequence"]
    assert shape(inputs["attention_mask"]) == ["batch", "total_sequence"]
    assert outputs["logits"].elem_type == TensorProto.FLOAT
    for layer, length in enumerate(["chunked_max_sequence"] * 3 + ["max_sequence"]):
        for part in ("key", "value"):
            past, present = inputs[f"past_key_values.{layer}.{part}"], outputs[f"present.{layer}.{part}"]
            assert past.elem_type == present.elem_type == kind
            assert shape(past) == shape(present) == ["batch", 2, length, 32]


def _operators(graph: onnx.GraphProto) -> set[tuple[str, str]]:
    found = {(node.domain, node.op_type) for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found |= _operators(attribute.g)
    return found


def test_the_graph_for_tensorrt_rtx_is_what_its_parser_takes(artifacts):
    file = artifacts["tensorrt-rtx"][0] / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    assert {domain for domain, _ in _operators(model.graph)} == {""}
    assert {op for _, op in _operators(model.graph)} <= OPERATORS
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 24)]
    assert not model.functions
    onnx.checker.check_model(str(file), full_check=True)


def test_fp8_activations_add_two_operators(scout_layout):
    model = lowered(open_checkpoint(scout_layout), "tensorrt-rtx", "static", load_recipe("fp8"), "bfloat16")
    operators = op_counts(model).keys()
    assert operators <= OPERATORS | FP8_OPERATORS
    assert operators >= FP8_OPERATORS


def test_the_graph_for_tensorrt_leaves_calls_for_the_plugins(artifacts):
    """And their functions, so that any runtime can inline them."""
    model = onnx.load(artifacts["tensorrt"][0] / "model.onnx", load_external_data=False)
    custom = [node for node in model.graph.node if node.domain == "l4convert"]
    assert sorted(node.op_type for node in custom) == ["LongContextAttention"] * 4 + ["MoE"] * 4
    assert {function.name for function in model.functions} == {"LongContextAttention", "MoE"}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in custom:
        if node.op_type == "MoE":
            assert [stored[name] for name in (node.input[2], node.input[4])] == [TensorProto.INT64] * 2


def test_large_packed_experts_are_unpacked_in_every_call(artifacts, monkeypatch):
    """Held in float32 from the start, those of Scout would be 400 GB."""
    opened, logits = [], []
    monkeypatch.setattr(onnxruntime, "InferenceSession", _recorded(onnxruntime.InferenceSession, opened))
    for most in (session_module._FOLDED_BYTES, 0):
        monkeypatch.setattr(session_module, "_FOLDED_BYTES", most)
        with OrtSession.open(artifacts["tensorrt"][0], max_length=64) as session:
            logits.append(session.start(1).step(np.full((1, 9), 7)))
    assert opened == [[], ["ConstantFolding"]]
    np.testing.assert_array_equal(*logits)


def _recorded(honest, opened):
    def session(*args, disabled_optimizers, **options):
        opened.append(disabled_optimizers)
        return honest(*args, disabled_optimizers=disabled_optimizers, **options)

    return session


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--target", "cpu", "--compute", "bfloat16"], "target cpu has no 'bfloat16' compute type", "float32"),
        (["--target", "tensorrt-rtx", "--kv-cache", "growing"], "has no 'growing' KV cache", "it has: static"),
        (["--target", "tensorrt", "--kv-cache", "windowed"], "has no 'windowed' KV cache", "it has: static"),
    ],
)
def test_what_a_target_does_not_have_is_refused_with_what_it_has(capsys, nano, tmp_path, options, message, hint):
    assert cli.run(["convert", str(nano), "-o", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert hint in error
    assert not (tmp_path / "out").exists()


def test_plan_says_the_compute_type(capsys, nano):
    for options, expected in (([], "bfloat16"), (["--compute", "float16"], "float16")):
        assert cli.run(["plan", str(nano), "--target", "tensorrt-rtx", "--json", *options]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["target"], plan["kv_cache"], plan["compute"]) == ("tensorrt-rtx", "static", expected)
