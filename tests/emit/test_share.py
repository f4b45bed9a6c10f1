"""Sharing weights with a checkpoint: what is shared, that it computes the same, that damage is found, who reads it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from l4convert.checkpoint.combiners import cast, transposed
from l4convert.checkpoint.lazy import Constant
from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.emit import read_manifest, share, verify_artifact, write_artifact
from l4convert.emit.plan import plan_weights
from l4convert.errors import InputError, UsageError
from tests.emit.models import holder, values
from tests.emit.shards import array, product, raw_shard, run, shared_artifact, write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "ckpt")


def test_exactly_the_unchanged_tensors_are_shared(shard: Path) -> None:
    stored = open_safetensors(shard)
    tensors: dict[str, ir.TensorProtocol] = {
        "same": stored["first"],
        "turned": transposed(stored["second"]),
        "turned twice": transposed(transposed(stored["second"])),
        "wide": cast(stored["third"], ir.DataType.FLOAT),
        "table": Constant(values(ir.DataType.FLOAT, [64, 8])),
    }
    plan = plan_weights(holder(tensors), share=True)
    assert [(t.name, t.file, t.offset, t.nbytes) for t in plan.shared] == [
        (name, "checkpoint-model-00001-of-00002.safetensors", stored[key].offset, 8192)
        for name, key in (("same", "first"), ("turned twice", "second"))
    ]
    assert [t.name for t in plan.tensors] == ["turned", "wide", "table"]
    assert plan.unshared == {"transposed": 8192, "computed": 4096, "not from the checkpoint": 2048}


def test_nothing_is_shared_unless_asked_for(shard: Path) -> None:
    plan = plan_weights(holder({"same": open_safetensors(shard)["first"]}))
    assert (plan.shared, plan.unshared) == ((), {})


def test_a_file_of_which_little_is_used_is_not_shared(shard: Path) -> None:
    stored = open_safetensors(shard)
    # Twice the same bytes are not more of the file.
    again = open_safetensors(shard)
    for tensors in ({"a": stored["second"]}, {"a": stored["second"], "b": again["second"]}):
        plan = plan_weights(holder(dict(tensors)), share=True)
        assert plan.shared == ()
        assert plan.unshared == {"in files of which less than 50% is used": 8192 * len(tensors)}
    assert len(plan_weights(holder({"a": stored["first"], "b": stored["second"]}), share=True).shared) == 2


@pytest.mark.parametrize(("pad", "shared"), [(8, 1), (2, 1), (1, 0), (3, 0)])
def test_a_tensor_that_is_not_aligned_is_not_shared(tmp_path: Path, pad: int, shared: int) -> None:
    stored = open_safetensors(raw_shard(tmp_path / "w.safetensors", pad, array(64, 64)))["w"]
    plan = plan_weights(holder({"w": stored}), share=True)
    assert len(plan.shared) == shared
    assert plan.unshared == ({} if shared else {"not aligned": 8192})


def test_a_shared_artifact_computes_the_same_from_the_checkpoints_own_file(shard: Path, tmp_path: Path) -> None:
    content = shard.read_bytes()
    out = shared_artifact(shard, tmp_path / "out")
    stored = open_safetensors(shard)
    copied = write_artifact(product(stored["first"], stored["second"]), tmp_path / "copied")
    np.testing.assert_array_equal(run(out), run(copied))
    linked = out / "checkpoint-model-00001-of-00002.safetensors"
    assert not linked.is_symlink()
    assert linked.read_bytes() == shard.read_bytes() == content
    assert (out / "model.safetensors").stat().st_size == 4096 + 2048  # a header, and `third` transposed
    tensors = read_manifest(out)["tensors"]
    assert tensors["layer.weight"] == {
        "dtype": "BFLOAT16",
        "shape": [64, 64],
        "nbytes": 8192,
        "sha256": hashlib.sha256(array(64, 64).tobytes()).hexdigest(),
        "file": linked.name,
        "key": "first",
    }
    assert "file" not in tensors["other.1"]
    assert read_manifest(out)["files"][linked.name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert verify_artifact(out).ok


def test_the_artifact_outlives_the_checkpoint(shard: Path, tmp_path: Path) -> None:
    out = shared_artifact(shard, tmp_path / "out")
    before = run(out)
    shutil.rmtree(shard.parent)
    assert verify_artifact(out).ok
    np.testing.assert_array_equal(run(out), before)
    onnx.load(out / "model.onnx")


def test_a_file_that_is_a_link_itself_is_shared_by_its_content(shard: Path, tmp_path: Path) -> None:
    # A Hugging Face cache keeps snapshots of links into a store of blobs.
    shard.rename(tmp_path / "blob")
    shard.symlink_to("../blob")
    linked = shared_artifact(shard, tmp_path / "out") / "checkpoint-model-00001-of-00002.safetensors"
    assert not linked.is_symlink()
    assert linked.read_bytes() == (tmp_path / "blob").read_bytes()


def test_an_artifact_is_made_over_a_shared_one(shard: Path, tmp_path: Path) -> None:
    content = shard.read_bytes()
    out = shared_artifact(shard, tmp_path / "out")
    write_artifact(product(open_safetensors(shard)["first"]), out, overwrite=True)
    assert verify_artifact(out).ok
    assert shard.read_bytes() == content


def test_a_shared_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    content = array(64, 64)
    content[63, 63] = np.nan
    shard = raw_shard(tmp_path / "w.safetensors", 0, content)
    with pytest.raises(InputError, match=r"tensor 'w': 1 of the 4096 values .* NaN or infinite"):
        write_artifact(product(open_safetensors(shard)["w"]), tmp_path / "out", share_weights=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]


def test_a_shard_that_changed_meanwhile_is_refused(shard: Path, tmp_path: Path) -> None:
    model = product(*(open_safetensors(shard)[name] for name in ("first", "second")))
    os.utime(shard, ns=(1, 1))
    with pytest.raises(InputError, match="changed since it was opened"):
        write_artifact(model, tmp_path / "out", share_weights=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (18, "cannot be shared: OUT would be on another filesystem"),
        (1, "cannot be shared: no hard link in .*: Operation not permitted"),
    ],
)
def test_a_refused_link_is_one_clear_line(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError, match=message) as caught:
        shared_artifact(shard, tmp_path / "out")
    assert "leave --share-weights out" in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_filesystem_that_can_clone_does(shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(target: int, request: int, source: int) -> None:
        assert request == 0x40049409  # FICLONE, <linux/fs.h>
        os.write(target, os.pread(source, 1 << 20, 0))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert share.try_link(shard, tmp_path) == "reflink"
    out = shared_artifact(shard, tmp_path / "out")
    assert shard.stat().st_nlink == 1
    assert verify_artifact(out).ok
    with shard.open("r+b") as file:  # what happens to the checkpoint does not happen to the artifact
        file.write(b"other")
    assert verify_artifact(out).ok


def test_trying_a_link_leaves_nothing(shard: Path, tmp_path: Path) -> None:
    assert share.try_link(shard, tmp_path) in {"hard link", "reflink"}
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert shard.stat().st_nlink == 1
