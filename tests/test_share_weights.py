"""``--share-weights`` from end to end: through the command line, as a user has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.runtime import OrtSession
from tests.checkpoints import MAVERICK, write_random_checkpoint
from tests.test_end_to_end import TEXT, run, run_json, with_tokenizer

OPTIONS = ("--target", "portable", "--recipe", "none")
SHARE = (*OPTIONS, "--share-weights")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maverick's layout in three files, with vision weights and the names of the multimodal model."""
    path = tmp_path_factory.mktemp("share") / "ckpt"
    return with_tokenizer(write_random_checkpoint(path, conditional=True, shards=3, **MAVERICK))


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> Any:
    return run_json("convert", checkpoint, "-o", checkpoint.parent / "shared", *SHARE)


@pytest.fixture
def artifact(result: Any, checkpoint: Path, tmp_path: Path) -> Path:
    """The artifact and its checkpoint, for a test to damage: a hard link of each file, or a copy where it is cloned."""
    for name in ("ckpt", "shared"):
        shutil.copytree(checkpoint.parent / name, tmp_path / name)
    for path in (tmp_path / "shared").glob("checkpoint-*"):
        path.unlink()
        os.link(tmp_path / "ckpt" / path.name.removeprefix("checkpoint-"), path)
    return tmp_path / "shared"


def _logits(out: Path) -> list[np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, 120, (2, 21))
    with OrtSession.open(out) as session:
        stream = session.start(2)
        return [stream.step(tokens[:, :11]), stream.step(tokens[:, 11:])]


def _unchanged(checkpoint: Path) -> set[tuple[str, str]]:
    """File (as the artifact calls it) and name of experts and embeddings, where they are at least half of a file."""
    found = set()
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118  # not a dict
        same = {name for name in sizes if re.search(r"experts\.(gate_up|down)_proj$|embed_tokens\.weight$", name)}
        if 2 * sum(sizes[name] for name in same) >= shard.stat().st_size:
            found |= {(f"checkpoint-{shard.name}", name) for name in same}
    return found


def test_only_what_changes_is_written_and_the_logits_are_the_same(result: Any, checkpoint: Path) -> None:
    out, copied = Path(result["output"]), checkpoint.parent / "copied"
    whole = run_json("convert", checkpoint, "-o", copied, *OPTIONS)
    for shared, plain in zip(_logits(out), _logits(copied), strict=True):
        np.testing.assert_array_equal(shared, plain)
    sharing = result["shared"]
    assert whole["shared"] is None
    assert sharing["bytes"] + result["bytes"] == whole["bytes"]
    assert sharing["tensors"] + result["tensors"] == whole["tensors"]
    assert sum(row["bytes"] for row in sharing["written"]) == result["bytes"]
    reasons = {"transposed", "in files of which less than 50% is used"}  # the vision encoder fills one of three
    assert {row["reason"] for row in sharing["written"]} == reasons
    for name, size in sharing["files"].items():
        assert (out / name).read_bytes() == (checkpoint / name.removeprefix("checkpoint-")).read_bytes()
        assert (out / name).stat().st_size == size
    tensors = json.loads((out / "l4convert.json").read_text())["tensors"]
    found = {(entry["file"], entry["key"]) for entry in tensors.values() if "file" in entry}
    assert found == _unchanged(checkpoint)
    assert len(found) == sharing["tensors"] > 0
    assert {entry["sha256"] for entry in tensors.values()} == {
        entry["sha256"] for entry in json.loads((copied / "l4convert.json").read_text())["tensors"].values()
    }


def test_every_command_takes_it(result: Any, checkpoint: Path, tmp_path: Path) -> None:
    out = Path(result["output"])
    (tmp_path / "text").write_text(TEXT)
    assert run_json("verify", out)["ok"]
    options = ("--text", tmp_path / "text", "--tokens", 180, "--window", 90)
    assert run_json("validate", out, "--reference", checkpoint, *options)["passed"]
    assert len(run_json("generate", out, "--prompt", "def main", "--max-new-tokens", 4)["token_ids"]) > 0
    assert result["shared"]["files"].items() <= run_json("inspect", out)["files"].items()
    again = run_json("convert", checkpoint, "-o", out, *SHARE, "--overwrite")
    assert again["shared"] == result["shared"]
    run("verify", out)


def test_a_changed_byte_of_the_checkpoint_is_found(artifact: Path) -> None:
    tensors = json.loads((artifact / "l4convert.json").read_text())["tensors"]
    name, entry = next((name, entry) for name, entry in tensors.items() if "file" in entry)
    shard = artifact.parent / "ckpt" / entry["file"].removeprefix("checkpoint-")
    with shard.open("r+b") as file:
        file.seek(open_safetensors(shard)[entry["key"]].offset)
        file.write(b"\x11")
    problems = run_json("verify", artifact, code=4)["problems"]
    assert problems[0] == f"{entry['file']}: tensor {name}: SHA-256 differs from the manifest's"


def test_it_outlives_the_checkpoint(artifact: Path) -> None:
    before = _logits(artifact)
    shutil.rmtree(artifact.parent / "ckpt")
    run("verify", artifact)
    for now, then in zip(_logits(artifact), before, strict=True):
        np.testing.assert_array_equal(now, then)
    onnx.checker.check_model(str(artifact / "model.onnx"))  # the only name of each file now


def test_a_dry_run_shows_the_same_and_writes_nothing(result: Any, checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(checkpoint.parent.iterdir())
    plan = run_json("convert", checkpoint, "-o", checkpoint.parent / "later", *SHARE, "--dry-run")
    assert plan["shared"] == result["shared"]
    assert plan["files"]["model.safetensors"] == (Path(result["output"]) / "model.safetensors").stat().st_size
    assert plan["disk"]["needed_bytes"] < plan["source_bytes"] + (1 << 21)
    rows = run_json("plan", checkpoint, *SHARE, "--tensors", "--no-measure")["tensors"]
    assert sum(row["bytes"] for row in rows if row["file"].startswith("checkpoint-")) == plan["shared"]["bytes"]
    text = run("plan", checkpoint, "-o", tmp_path / "out", *SHARE, "--no-measure").stdout
    assert " of the checkpoint, each one a " in text
    assert " transposed, " in text
    assert sorted(checkpoint.parent.iterdir()) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--target", "cpu", "--recipe", "int4"), ("--target", "cpu", "--recipe", "fp8")])
def test_where_nothing_can_be_shared_it_is_said(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("convert", checkpoint, "-o", tmp_path / "out", *options, "--share-weights", code=2)
    assert "no weight of this conversion can stay in the checkpoint's files" in done.stderr
    assert "computed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_preset_has_nothing_to_share() -> None:
    assert "a preset has no files" in run("plan", "--preset", "scout", *SHARE, code=2).stderr


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second filesystem")
def test_another_filesystem_is_refused_before_anything_is_done(checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == checkpoint.stat().st_dev:
            pytest.skip("the same filesystem")
        done = run("convert", checkpoint, "-o", Path(other) / "out", *SHARE, code=2)
        shard = checkpoint / "model-00001-of-00003.safetensors"
        assert done.stderr.splitlines() == [
            f"error: {shard}: cannot be shared: OUT would be on another filesystem",
            "hint: write OUT to the checkpoint's filesystem, or leave --share-weights out, and copies are written",
        ]
        assert list(Path(other).iterdir()) == []
