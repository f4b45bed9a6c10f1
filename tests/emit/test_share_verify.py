"""Verification of artifacts that share weights with a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.emit import read_manifest, verify_artifact
from l4convert.emit.manifest import encode_manifest
from tests.emit.shards import shared_artifact, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "ckpt")


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_damage_to_a_shared_tensor_names_file_and_tensor(shard: Path, tmp_path: Path) -> None:
    linked = shared_artifact(shard, tmp_path / "out") / "checkpoint-model-00001-of-00002.safetensors"
    _flip(linked, open_safetensors(shard)["first"].offset + 100)
    problems = verify_artifact(tmp_path / "out").problems
    assert problems[0] == f"{linked.name}: tensor layer.weight: SHA-256 differs from the manifest's"
    assert problems[1].startswith(f"{linked.name}: its content is not what the manifest says")
    assert len(problems) == 2


def test_damage_beside_the_shared_tensors_names_the_file(shard: Path, tmp_path: Path) -> None:
    linked = shared_artifact(shard, tmp_path / "out") / "checkpoint-model-00001-of-00002.safetensors"
    _flip(linked, open_safetensors(shard)["third"].offset)
    (problem,) = verify_artifact(tmp_path / "out").problems
    assert problem.startswith(f"{linked.name}: its content is not what the manifest says")


def _set(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"][name].__setitem__(key, value)


LINKED = "checkpoint-model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("layer.weight", "file", "../ckpt/x"), "entry layer.weight of 'tensors' is malformed"),
        (_set("layer.weight", "file", "/etc/passwd"), "entry layer.weight of 'tensors' is malformed"),
        (_set("layer.weight", "file", ["x"]), "entry layer.weight of 'tensors' is malformed"),
        (_set("layer.weight", "key", {}), "entry layer.weight of 'tensors' is malformed"),
        (_set("layer.weight", "key", "fourth"), f"{LINKED}: tensor layer.weight is missing"),
        (_set("layer.weight", "key", "second"), f"{LINKED}: tensor layer.weight: SHA-256 differs"),
        (_set("layer.weight", "key", "third"), f"{LINKED}: tensor layer.weight: dtype or shape"),
        (_set("layer.weight", "file", "model.onnx"), "model.onnx: "),
        (_set("layer.weight", "file", "model.safetensors"), "model.safetensors: tensor layer.weight is missing"),
        (_set("other.1", "file", LINKED), "model.safetensors: tensor other.1 is not in the manifest"),
        (lambda manifest: manifest["files"].pop(LINKED), f"{LINKED}: not in the manifest"),
    ],
)
def test_hostile_manifests_are_reported(
    shard: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    out = shared_artifact(shard, tmp_path / "out")
    manifest = read_manifest(out)
    change(manifest)
    (out / "l4convert.json").write_bytes(encode_manifest(manifest))
    assert any(problem in line for line in verify_artifact(out).problems)


@pytest.mark.parametrize(("key", "value"), [("offset", "0"), ("location", "model.safetensors"), ("location", "gone")])
def test_a_reference_that_leads_elsewhere_is_named(shard: Path, tmp_path: Path, key: str, value: str) -> None:
    out = shared_artifact(shard, tmp_path / "out")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = value if entry.key == key else entry.value
    (out / "model.onnx").write_bytes(model.SerializeToString())
    assert any("tensor layer.weight does not refer" in line for line in verify_artifact(out).problems)
