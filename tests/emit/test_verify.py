"""Verification: an untouched artifact passes, any change to any file is found, hostile artifacts cause no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.emit import read_manifest, verify_artifact, write_artifact
from l4convert.emit.manifest import encode_manifest
from l4convert.errors import InputError
from tests.emit.models import Weight, holder, values

FILES = ["model.onnx", "model.safetensors", "l4convert.json", "config.json"]


def _model() -> Any:
    import onnx_ir as ir

    kinds = (ir.DataType.FLOAT, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
    tensors: dict[str, LazyTensor] = {dtype.name: Weight(values(dtype, [51, 60]), dtype.name) for dtype in kinds}
    return holder({**tensors, "small": Weight(np.ones(3, np.float32), "small")})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "out"
    return write_artifact(_model(), out, extra_files={"config.json": '{"a": 1}'}, manifest={"recipe": "int4"})


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def _rewrite(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as someone would who also mends its own digest."""
    manifest = read_manifest(out)
    change(manifest)
    (out / "l4convert.json").write_bytes(encode_manifest(manifest))


def test_an_untouched_artifact_passes(pristine: Path) -> None:
    report = verify_artifact(pristine)
    assert report.ok
    assert (report.files, report.tensors) == (3, 3)
    assert report.nbytes == sum(path.stat().st_size for path in pristine.iterdir())
    assert report.as_dict() == {
        "schema": "l4convert.verify/1",
        "ok": True,
        "files": 3,
        "tensors": 3,
        "bytes": report.nbytes,
        "problems": [],
    }


@settings(max_examples=150)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@example("model.safetensors", 0.999, 1)  # the last tensor's end
@example("model.safetensors", 0.1, 1)  # spaces that pad the header
@example("l4convert.json", 0.9999, 1)
def test_any_flipped_byte_is_found(pristine: Path, name: str, where: float, flip: int) -> None:
    path = pristine / name
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[int(where * len(damaged))] ^= flip
    path.write_bytes(damaged)
    try:
        problems = verify_artifact(pristine).problems
    except InputError as error:
        problems = (error.message.removeprefix(f"{pristine}/"),)  # the manifest is no JSON any more
    finally:
        path.write_bytes(original)
    assert any(problem.startswith(name) for problem in problems)
    assert all("\n" not in problem for problem in problems)


@settings(max_examples=60)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(pristine: Path, name: str, where: float) -> None:
    path = pristine / name
    original = path.read_bytes()
    path.write_bytes(original[: int(where * len(original))])
    try:
        assert not verify_artifact(pristine).ok
    except InputError:
        assert name == "l4convert.json"
    finally:
        path.write_bytes(original)


def test_a_damaged_tensor_is_named(artifact: Path) -> None:
    offsets = {t.name: t for t in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer}
    fields = {entry.key: entry.value for entry in offsets["INT4"].external_data}
    with (artifact / "model.safetensors").open("r+b") as file:
        file.seek(int(fields["offset"]) + 5)
        file.write(b"\x5a")
    problems = verify_artifact(artifact).problems
    assert problems[0] == "model.safetensors: tensor INT4: SHA-256 differs from the manifest's"
    assert problems[1].startswith("model.safetensors: its content is not what the manifest says")


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json"])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    assert verify_artifact(artifact).problems == (f"{name}: is missing",)


def test_unexpected_files_are_named_and_later_ones_allowed(artifact: Path) -> None:
    (artifact / "parity.json").write_text("{}")
    (artifact / "engines" / "rtx").mkdir(parents=True)
    assert verify_artifact(artifact).ok
    (artifact / "evil.py").write_text("")
    (artifact / "bad\nname").write_text("")
    (artifact / "folder").mkdir()
    os.mkfifo(artifact / "pipe")
    (artifact / "dangling").symlink_to("nowhere")
    assert set(verify_artifact(artifact).problems) == {
        "evil.py: not in the manifest",
        "'bad\\nname': not in the manifest",
        "folder: is not a file of an artifact",
        "pipe: is not a file of an artifact",
        "dangling: cannot be read: No such file or directory",
    }


def test_files_that_are_links_are_checked_by_content(artifact: Path, tmp_path: Path) -> None:
    # Hugging Face's cache keeps downloads so.
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for name in FILES:
        (artifact / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    assert verify_artifact(snapshot).ok
    (blobs / "config.json").write_text("other")
    assert not verify_artifact(snapshot).ok


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("files", to=None), "l4convert.json: has no table 'files'"),
        (_set("tensors", to=[1]), "l4convert.json: has no table 'tensors'"),
        (_set("files", "model.onnx", to=3), "entry model.onnx of 'files' is malformed"),
        (_set("files", "model.onnx", to={"bytes": 3}), "entry model.onnx of 'files' is malformed"),
        (_set("files", "model.onnx", "bytes", to=10**4000), "model.onnx: has "),
        (_set("files", "model.onnx", "bytes", to=[]), "model.onnx: has "),
        (_set("files", "model.onnx", "sha256", to={}), "model.onnx: its content"),
        (
            _set("files", "../../etc/passwd", to={"bytes": 1, "sha256": ""}),
            "../../etc/passwd is not the name of a file",
        ),
        (_set("files", "/etc/passwd", to={"bytes": 1, "sha256": ""}), "/etc/passwd is not the name of a file"),
        (_set("files", "a\0b", to={"bytes": 1, "sha256": ""}), "is not the name of a file"),
        (_set("files", "..", to={"bytes": 1, "sha256": ""}), ".. is not the name of a file"),
        (_set("files", "\ud800", to={"bytes": 1, "sha256": ""}), "'\\ud800': is missing"),
        (_set("files", "x" * 5000, to={"bytes": 1, "sha256": ""}), "x...: is missing"),
        (_set("tensors", "FLOAT", "shape", to=[51, 61]), "tensor FLOAT: dtype or shape"),
        (_set("tensors", "FLOAT", "shape", to=[-51, -60]), "tensor FLOAT: dtype or shape"),
        (_set("tensors", "FLOAT", "shape", to="51"), "tensor FLOAT: dtype or shape"),
        (_set("tensors", "FLOAT", "dtype", to=["FLOAT"]), "tensor FLOAT: dtype or shape"),
        (_set("tensors", "FLOAT", "dtype", to="UNDEFINED"), "tensor FLOAT: dtype or shape"),
        (_set("tensors", "INT4", "dtype", to="FLOAT16"), "tensor INT4: dtype or shape"),
        (_set("tensors", "INT4", "sha256", to=""), "tensor INT4: SHA-256 differs"),
        (_set("tensors", "more", to={"dtype": "", "shape": [], "nbytes": 0, "sha256": ""}), "tensor more is missing"),
    ],
)
def test_hostile_manifests_are_reported(artifact: Path, change: Callable[[dict[str, Any]], None], problem: str) -> None:
    try:
        _rewrite(artifact, change)
    except UnicodeEncodeError:  # lone surrogates cannot be written by us, but by others, escaped
        manifest = read_manifest(artifact)
        change(manifest)
        (artifact / "l4convert.json").write_text(json.dumps(manifest))
    problems = verify_artifact(artifact).problems
    assert any(problem in line for line in problems)
    assert all(line.isprintable() and len(line) < 500 for line in problems)


def _retell(artifact: Path, change: Callable[[onnx.TensorProto], object]) -> tuple[str, ...]:
    """Change how the graph refers to INT4, mending all digests, so that only the reference itself is wrong."""
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    change(next(tensor for tensor in model.graph.initializer if tensor.name == "INT4"))
    content = model.SerializeToString()
    (artifact / "model.onnx").write_bytes(content)
    import hashlib

    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _rewrite(artifact, _set("files", "model.onnx", to=entry))
    return verify_artifact(artifact).problems


def _field(key: str, value: str) -> Callable[[onnx.TensorProto], None]:
    def change(tensor: onnx.TensorProto) -> None:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _field("location", "../../etc/passwd"),
        _field("location", "/etc/passwd"),
        _field("location", "config.json"),
        _field("offset", "4097"),
        _field("offset", "-4096"),
        _field("offset", "9" * 5000),
        _field("offset", "x"),
        _field("length", "1"),
        _field("length", "99999999999999"),
        lambda tensor: tensor.ClearField("external_data"),
        lambda tensor: tensor.dims.append(2),
        lambda tensor: tensor.dims.__setitem__(0, -1),
        lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.FLOAT),
        lambda tensor: setattr(tensor, "data_type", onnx.TensorProto.STRING),
        lambda tensor: setattr(tensor, "data_type", 12345),
    ],
)
def test_references_that_do_not_fit_the_weights_are_named(
    artifact: Path, change: Callable[[onnx.TensorProto], object]
) -> None:
    assert _retell(artifact, change) == (
        "model.onnx: tensor INT4 does not refer to a tensor of its type and shape in model.safetensors",
    )


def test_references_inside_attributes_and_functions_are_found(artifact: Path) -> None:
    outside = onnx.TensorProto(name="secret", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=outside)
    body = onnx.helper.make_graph([constant], "body", [], [])
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Loop", [], ["l"], body=body))
    model.functions.append(onnx.helper.make_function("d", "f", [], ["c"], [constant], []))
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    problems = verify_artifact(artifact).problems
    assert sum("tensor secret does not refer" in problem for problem in problems) == 2


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_garbage_in_place_of_the_graph_or_weights_is_reported(pristine: Path, garbage: bytes) -> None:
    for name in ("model.onnx", "model.safetensors"):
        path = pristine / name
        original = path.read_bytes()
        try:
            for content in (garbage, original[:200] + garbage, garbage + original[len(garbage) :]):
                if content != original:
                    path.write_bytes(content)
                    assert not verify_artifact(pristine).ok
        finally:
            path.write_bytes(original)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an l4convert artifact"):
        verify_artifact(tmp_path)
