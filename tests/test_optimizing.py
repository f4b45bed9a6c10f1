"""``l4convert optimize`` from end to end: the command, the artifact, and transformers' own logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from l4convert import cli
from l4convert.emit import verify_artifact
from l4convert.graph_passes import CANONICAL_PASSES, NORMALIZING_PASSES
from l4convert.targets import TARGETS
from tests.checkpoints import write_random_checkpoint
from tests.exports import FOLDER, TWO_LAYERS, export
from tests.graphs import reference_logits, relative_error


def optimize(capsys: pytest.CaptureFixture[str], model: Path, out: Path, *options: str, code: int = 0) -> Any:
    assert cli.run(["optimize", str(model), "--output", str(out), *options, "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def interface(path: Path) -> list[Any]:
    graph = onnx.load(path, load_external_data=False).graph
    return [(value.name, value.type.SerializeToString()) for value in (*graph.input, *graph.output)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported here and now, by the torch and transformers that are installed, with its weights in another file."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_random_checkpoint(folder / "checkpoint", dtype="float32", **TWO_LAYERS)
    onnx.save(
        onnx.load(export(checkpoint, folder / "inline.onnx")),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )
    return folder / "model.onnx"


def test_a_fresh_export_gives_transformers_logits(exported, tmp_path, capsys):
    out = tmp_path / "out"
    result = optimize(capsys, exported, out, "--verify")
    fired = {row["name"]: row["fired"] for row in result["passes"]}
    assert fired["outline_exported_attention"] == fired["lower_attention_to_gqa"] == 2
    assert fired["fuse_experts"] == fired["lower_moe_to_qmoe"] == 1
    assert fired["normalize_norms"] == 7
    ids = np.random.default_rng(5).integers(3, 64, (2, 29))
    logits = session(out / "model.onnx").run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert relative_error(logits, reference_logits(exported.parent / "checkpoint", ids)) <= 1e-5
    assert result["verify"]["outputs"][0]["max_error"] <= 1e-4
    assert result["bytes_before"] == sum((exported.parent / f"model.onnx{x}").stat().st_size for x in ("", ".data"))
    assert verify_artifact(out).ok
    assert interface(out / "model.onnx") == interface(exported)


@pytest.mark.parametrize(
    ("target", "recipe", "operator", "bound"),
    [
        ("cpu", "int4", "QMoE", 0.6),
        ("cpu", "fp8", "DequantizeLinear", 0.6),
        ("cuda", "int4", "MatMulNBits", 0.6),
        ("tensorrt-rtx", "int4", "Loop", 0.6),
    ],
)
def test_recipes_are_applied_for_every_target(tmp_path, capsys, target, recipe, operator, bound):
    model, out = FOLDER / "eager.onnx", tmp_path / "out"
    result = optimize(capsys, model, out, "--verify", "--target", target, "--recipe", recipe)
    rows = (*NORMALIZING_PASSES, *CANONICAL_PASSES[:3], *TARGETS[target].lowering)
    assert [row["name"] for row in result["passes"]] == [row.name for row in rows]
    assert result["quantized"] == 16  # 4 of attention in each layer, 3 of the dense one, 3 shared, 2 of experts
    (logits,) = result["verify"]["outputs"]
    assert 0 < logits["mean_error"] <= bound
    assert result["verify"]["tolerance"] is None
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    assert operator in {node.op_type for node in nodes}
    assert verify_artifact(out).ok


def test_bfloat16_goes_to_a_target_that_computes_in_it(tmp_path, capsys):
    model = FOLDER / "sdpa-bfloat16.onnx"
    message = optimize(capsys, model, tmp_path / "no", code=3)
    assert "computes in bfloat16, and target cpu in float32" in message
    assert not (tmp_path / "no").exists()
    result = optimize(capsys, model, tmp_path / "out", "--target", "cuda", "--verify")
    assert result["compute"] == "bfloat16"
    assert result["verify"]["tolerance"] == 6e-2


def test_caches_go_in_and_out_as_before(tmp_path, capsys):
    model, out = FOLDER / "sdpa-cache.onnx", tmp_path / "out"
    result = optimize(capsys, model, out, "--verify")
    assert len(result["verify"]["outputs"]) == 5
    assert max(row["max_error"] for row in result["verify"]["outputs"]) <= 1e-5
    assert interface(out / "model.onnx") == interface(model)
    assert b"site-packages" not in (out / "model.onnx").read_bytes()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    result = optimize(capsys, FOLDER / "eager.onnx", tmp_path / "out", "--dry-run", "--recipe", "int4")
    assert result["dry_run"]
    assert result["bytes_after"] < result["bytes_before"]
    assert not (tmp_path / "out").exists()
    message = optimize(capsys, FOLDER / "eager.onnx", tmp_path / "out", "--dry-run", "--verify", code=2)
    assert "--dry-run" in message


def test_the_same_model_gives_the_same_bytes(tmp_path, capsys):
    for name in ("a", "b"):
        optimize(capsys, FOLDER / "eager.onnx", tmp_path / name, "--recipe", "int4")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }


def test_an_artifact_is_inspected_and_not_run_as_a_decoder(tmp_path, capsys):
    out = tmp_path / "out"
    optimize(capsys, FOLDER / "eager.onnx", out, "--recipe", "int4")
    assert cli.run(["inspect", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["target"], shown["recipe"]) == ("artifact", "cpu", "int4")
    assert shown["quantized_share"] > 0.7
    assert cli.run(["bench", str(out)]) == 3
    assert "was made by `l4convert optimize`" in capsys.readouterr().err


def test_the_table_tells_what_fired_and_why_not(tmp_path, capsys):
    model = onnx.load(FOLDER / "eager.onnx")
    for node in model.graph.node:
        if node.op_type == "TopK":
            next(a for a in node.attribute if a.name == "largest").i = 0
    onnx.save(model, tmp_path / "model.onnx")
    assert cli.run(["optimize", str(tmp_path / "model.onnx"), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "outline_exported_attention" in text
    assert "the smallest logits are chosen" in text


def test_any_other_model_is_written_as_it_is_with_the_reasons(tmp_path, capsys):
    make = onnx.helper
    x, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.ones((16, 16), np.float32), "w")
    nodes = [make.make_node("MatMul", ["x", "w"], ["p"]), make.make_node("Relu", ["p"], ["y"])]
    graph = make.make_graph(nodes, "g", [x], [y], [weight])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    result = optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", "--verify", "--recipe", "int4")
    assert result["quantized"] == 0
    assert "quantized nothing" in result["notes"][0]
    assert result["verify"]["outputs"][0]["max_error"] == 0
    assert [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node] == ["MatMul", "Relu"]


def test_a_model_that_stays_at_its_opset_is_told_by_every_pass(tmp_path, capsys):
    make = onnx.helper
    x, y = (make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16]) for name in "xy")
    nodes = [make.make_node("ReduceMean", ["x"], ["m"], axes=[1]), make.make_node("Add", ["x", "m"], ["y"])]
    graph = make.make_graph(nodes, "g", [x], [y])
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / "model.onnx")
    result = optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", "--verify")
    first, *others = result["passes"]
    assert first["skipped"] == [{"node": "ReduceMean", "reason": "opsets 17 and 23 differ in attribute axes"}]
    reason = "it writes operators of opset 23, and the model stays at 17"
    assert all(row["skipped"] == [{"node": "the graph", "reason": reason}] for row in others)
    assert result["verify"]["outputs"][0]["max_error"] == 0


def test_a_mask_that_was_folded_into_a_constant_may_be_infinite(tmp_path, capsys):
    model = onnx.load(FOLDER / "eager.onnx")
    mask = np.triu(np.full((32, 32), -np.inf, np.float32), 1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "folded"))
    model.graph.node.append(onnx.helper.make_node("Softmax", ["folded"], ["weights"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("weights", onnx.TensorProto.FLOAT, [32, 32]))
    onnx.save(model, tmp_path / "model.onnx")
    optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", "--verify")


def test_what_is_wrong_leaves_no_output(tmp_path, capsys):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    assert "bad.onnx: is not an ONNX model" in optimize(capsys, bad, tmp_path / "out", code=3)
    assert "no such file" in optimize(capsys, tmp_path / "none.onnx", tmp_path / "out", code=3)
    shutil.copy(FOLDER / "eager.onnx", tmp_path / "model.onnx")
    assert "unknown target" in optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", "--target", "abacus", code=2)
    assert "keeps the codes" in optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", "--recipe", "keep", code=2)
    model = onnx.load(tmp_path / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "lm_head.weight" or list(t.dims) == [32, 64])
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "model.onnx")
    message = optimize(capsys, tmp_path / "model.onnx", tmp_path / "out", code=3)
    assert "NaN" in message
    assert weight.name in message
    assert not (tmp_path / "out").exists()
