"""Artifacts on disk: ONNX Runtime computes with them, two runs are identical, failures leave nothing."""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from l4convert.checkpoint.combiners import Mapped
from l4convert.checkpoint.lazy import Constant
from l4convert.emit import Filling, verify_artifact, write_artifact
from l4convert.emit.header import PAGE
from l4convert.errors import InputError, UsageError
from tests.emit.models import Weight, holder, initializer, two_layer, values


def _run(out: Path, **inputs: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _graph(nodes: list[ir.Node], x: ir.Value, shape: list[int], weights: list[ir.Value]) -> ir.Model:
    out = nodes[-1].outputs[0]
    out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph([x], [out], nodes=nodes, initializers=weights, opset_imports={"": 23}, name="main")
    return ir.Model(graph, ir_version=11)


def _x(*shape: int) -> ir.Value:
    return ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def test_onnxruntime_computes_with_the_artifact(tmp_path: Path) -> None:
    model = two_layer()
    weight, bias = (model.graph.initializers[name].const_value for name in ("weight", "bias"))
    assert weight is not None
    assert bias is not None
    out = write_artifact(model, tmp_path / "out")
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    expected = (x @ weight.numpy() + bias.numpy()) * np.float32(0.5)
    np.testing.assert_allclose(_run(out, x=x), expected, rtol=1e-5, atol=1e-5)
    assert model.graph.initializers["weight"].const_value is weight  # the model is as it was
    assert verify_artifact(out).ok


def test_int4_blocks_dequantize_in_onnxruntime(tmp_path: Path) -> None:
    quantized, scale_array = values(ir.DataType.INT4, [96, 64]), values(ir.DataType.FLOAT, [96, 2], 1)
    q, s = initializer("q", Weight(quantized, "w")), initializer("s", Weight(np.repeat(scale_array, 3, 1)[:, :2], "w"))
    scales = np.asarray(s.const_value)
    x = _x(2, 96)
    nodes = [ir.node("DequantizeLinear", [q, s], {"axis": 1, "block_size": 32})]
    nodes.append(ir.node("MatMul", [x, nodes[0].outputs[0]]))
    out = write_artifact(_graph(nodes, x, [2, 64], [q, s]), tmp_path / "out")
    dense = quantized.astype(np.float32) * np.repeat(scales, 32, axis=1)
    given = np.eye(2, 96, dtype=np.float32)
    np.testing.assert_array_equal(_run(out, x=given), given @ dense)


def test_int4_with_an_odd_width_keeps_every_value(tmp_path: Path) -> None:
    quantized = values(ir.DataType.INT4, [75, 33])
    q, s = initializer("q", Weight(quantized)), initializer("s", ir.tensor(np.float32(1)))
    x = _x(75, 33)
    nodes = [ir.node("DequantizeLinear", [q, s])]
    nodes.append(ir.node("Add", [x, nodes[0].outputs[0]]))
    out = write_artifact(_graph(nodes, x, [75, 33], [q, s]), tmp_path / "out")
    np.testing.assert_array_equal(_run(out, x=np.zeros((75, 33), np.float32)), quantized.astype(np.float32))


def test_fp8_dequantizes_in_onnxruntime(tmp_path: Path) -> None:
    quantized = values(ir.DataType.FLOAT8E4M3FN, [64, 64])
    q, s = initializer("q", Weight(quantized)), initializer("s", ir.tensor(np.float32(0.25)))
    x = _x(64, 64)
    nodes = [ir.node("DequantizeLinear", [q, s])]
    nodes.append(ir.node("Add", [x, nodes[0].outputs[0]]))
    out = write_artifact(_graph(nodes, x, [64, 64], [q, s]), tmp_path / "out")
    np.testing.assert_array_equal(_run(out, x=np.zeros((64, 64), np.float32)), quantized.astype(np.float32) / 4)


def test_bf16_is_cast_in_onnxruntime(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    w, x = initializer("w", Weight(weight)), _x(64, 64)
    nodes = [ir.node("Cast", [w], {"to": int(ir.DataType.FLOAT)})]
    nodes.append(ir.node("Add", [x, nodes[0].outputs[0]]))
    out = write_artifact(_graph(nodes, x, [64, 64], [w]), tmp_path / "out")
    np.testing.assert_array_equal(_run(out, x=np.zeros((64, 64), np.float32)), weight.astype(np.float32))


def test_a_shared_tensor_serves_both_names(tmp_path: Path) -> None:
    shared = Weight(np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32))
    a, b, x = initializer("a", shared), initializer("b", shared), _x(64, 64)
    nodes = [ir.node("Add", [x, a])]
    nodes.append(ir.node("Add", [nodes[0].outputs[0], b]))
    out = write_artifact(_graph(nodes, x, [64, 64], [a, b]), tmp_path / "out")
    np.testing.assert_array_equal(_run(out, x=np.zeros((64, 64), np.float32)), 2 * shared.numpy())
    assert verify_artifact(out).problems == ()


def test_initializers_of_subgraphs_are_stored_too(tmp_path: Path) -> None:
    def branch(name: str, factor: float) -> ir.Graph:
        weight = initializer("w", Weight(np.full((64, 64), factor, np.float32), name))
        node = ir.node("Identity", [weight])
        node.outputs[0].name = f"{name}_out"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([64, 64])
        return ir.Graph([], node.outputs, nodes=[node], initializers=[weight], name=name)

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    node = ir.node("If", [x], {"then_branch": branch("yes", 2.0), "else_branch": branch("no", 3.0)})
    out = write_artifact(_graph([node], x, [64, 64], []), tmp_path / "out")
    assert _run(out, x=np.array(True))[0, 0] == 2
    assert _run(out, x=np.array(False))[0, 0] == 3
    assert sorted(json.loads((out / "l4convert.json").read_text())["tensors"]) == ["w", "w.2"]
    assert verify_artifact(out).problems == ()


def test_two_runs_give_identical_bytes(tmp_path: Path) -> None:
    sidecar = tmp_path / "ckpt" / "tokenizer.json"
    sidecar.parent.mkdir()
    sidecar.write_text("{}")
    outs = [
        write_artifact(
            two_layer(), tmp_path / name, sidecars=[sidecar], extra_files={"genai_config.json": "{}"}, manifest={"a": 1}
        )
        for name in ("one", "elsewhere/two")
    ]
    first, second = map(_snapshot, outs)
    assert first == second
    assert set(first) == {"model.onnx", "model.safetensors", "l4convert.json", "tokenizer.json", "genai_config.json"}
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_model_file_is_small_and_refers_only_to_the_weights_file(tmp_path: Path) -> None:
    out = write_artifact(two_layer(256), tmp_path / "out")
    assert (out / "model.onnx").stat().st_size < 1000
    model = onnx.load(out / "model.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in external} == {"weight", "bias"}
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        assert fields.keys() == {"location", "offset", "length"}
        assert fields["location"] == "model.safetensors"
        assert int(fields["offset"]) % PAGE == 0


def test_extra_files_win_over_sidecars(tmp_path: Path) -> None:
    sidecar = tmp_path / "ckpt" / "config.json"
    sidecar.parent.mkdir()
    sidecar.write_text("theirs")
    out = write_artifact(two_layer(), tmp_path / "out", sidecars=[sidecar], extra_files={"config.json": b"ours"})
    assert (out / "config.json").read_text() == "ours"


@pytest.mark.parametrize("name", ["model.onnx", "l4convert.json", "../up", ""])
def test_extra_files_cannot_take_other_places(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        write_artifact(two_layer(), tmp_path / "out", extra_files={name: ""})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("size", [64, 5000])  # inline and external
def test_nan_and_infinity_are_refused_with_tensor_and_count(tmp_path: Path, dtype: str, size: int) -> None:
    array = np.ones(size, np.float32)
    array[[3, size - 1]] = np.nan
    array[5] = np.nan if dtype == "float8_e4m3fn" else -np.inf
    tensor = Weight(array.astype(np.dtype(dtype)), "model.norm.weight")
    with pytest.raises(InputError, match=rf"'model.norm.weight': 3 of the {size} values"):
        write_artifact(holder({"w": tensor}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_largest_finite_values_pass(tmp_path: Path) -> None:
    largest = {"float32": 3.4028234e38, "float16": 65504, "bfloat16": 3.3895314e38, "float8_e4m3fn": 448}
    tensors = {name: Weight(np.full(3000, value).astype(np.dtype(name)), name) for name, value in largest.items()}
    assert all(float(tensor.array.reshape(-1)[0]) == pytest.approx(largest[name]) for name, tensor in tensors.items())
    assert verify_artifact(write_artifact(holder(dict(tensors)), tmp_path / "out")).ok


def test_constants_of_the_graph_may_be_infinite(tmp_path: Path) -> None:
    mask = Constant(np.full((64, 64), -np.inf, np.float32))
    assert write_artifact(holder({"mask": mask}), tmp_path / "out").is_dir()


def test_a_full_disk_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("l4convert.emit.staging.shutil.disk_usage", lambda path: usage)

    def explode(tile: np.ndarray) -> np.ndarray:
        raise AssertionError("worked before checking")

    lazy = Mapped(Weight(np.zeros((64, 64), np.float32)), explode, ir.DataType.FLOAT)
    with pytest.raises(InputError, match=r"\d+ bytes are needed, 5000 are free: \d+ too few"):
        write_artifact(holder({"w": lazy}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_disk_that_fails_midway_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    real, calls = os.pwrite, 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        large = len(data) > 100 and bytes(data[:1]) != b"{"  # the lock file and the journal are written so too
        calls += large
        if large and calls == call:
            raise OSError(code, os.strerror(code))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(InputError) as caught:
        write_artifact(two_layer(), tmp_path / "out", filling=Filling(jobs=1))
    assert os.strerror(code) in caught.value.message
    assert caught.value.message.startswith("model.safetensors: ")
    if code != errno.EIO:
        assert "bytes are still to be written" in caught.value.message
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if call == 3 else [])
    assert ("run the same command again" in caught.value.hint) == (call == 3)
    monkeypatch.undo()
    resumed: list[int] = []
    out = write_artifact(two_layer(), tmp_path / "out", on_resumed=resumed.append)
    assert resumed == [64 * 64 * 4 if call == 3 else 0]
    assert _snapshot(out) == _snapshot(write_artifact(two_layer(), tmp_path / "undisturbed"))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    expected = _snapshot(write_artifact(two_layer(), tmp_path / "whole"))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:1000], offset))
    assert _snapshot(write_artifact(two_layer(), tmp_path / "pieces")) == expected


def test_an_unreadable_source_names_the_tensor(tmp_path: Path) -> None:
    def fail(tile: np.ndarray) -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    lazy = Mapped(Weight(np.zeros((64, 64), np.float32)), fail, ir.DataType.FLOAT)
    with pytest.raises(InputError, match="tensor 'w': its source cannot be read: Input/output error"):
        write_artifact(holder({"w": lazy}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_sidecar_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json: cannot be read: No such file"):
        write_artifact(two_layer(), tmp_path / "out", sidecars=[tmp_path / "ckpt" / "gone.json"])


@pytest.mark.parametrize("out", ["ckpt", "ckpt/inside", "."])
def test_the_checkpoint_is_kept_clear(tmp_path: Path, out: str) -> None:
    checkpoint = tmp_path / "ckpt"
    checkpoint.mkdir()
    (tmp_path / "link").symlink_to(checkpoint)
    for source in (checkpoint, tmp_path / "link"):
        with pytest.raises(UsageError, match="must not be, lie in or contain the checkpoint"):
            write_artifact(two_layer(), tmp_path / out, checkpoint=source, overwrite=True)


def test_progress_counts_every_byte_of_the_weights(tmp_path: Path) -> None:
    totals: list[float] = []
    done: list[float] = []

    class Task:
        def advance(self, amount: float) -> None:
            done.append(amount)

        def update(self, description: str) -> None:
            pass

    class Recorder:
        @contextmanager
        def task(self, description: str, total: float | None = None, unit: str = "B"):  # type: ignore[no-untyped-def]
            totals.append(total or 0)
            yield Task()

    write_artifact(
        holder({name: Weight(np.ones(300, np.float32)) for name in "ab"}), tmp_path / "out", progress=Recorder()
    )
    assert sum(done) == totals[0] == PAGE + 2 * 1200
