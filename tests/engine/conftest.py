"""Artifacts to build engines from, and the stub builder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from l4convert.emit import read_manifest
from l4convert.emit.manifest import encode_manifest
from l4convert.pipeline import ConvertOptions, convert
from tests.checkpoints import write_random_checkpoint
from tests.plugins.conftest import interpreted_library

__all__ = ["interpreted_library"]


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, both chunked, no experts: builds in a second or two."""
    path = tmp_path_factory.mktemp("dense") / "checkpoint"
    return write_random_checkpoint(path, num_hidden_layers=2, interleave_moe_layer_step=9)


def _converted(checkpoint: Path, out: Path, recipe: str) -> Path:
    block = 32 if recipe == "int4" else None
    options = ConvertOptions(checkpoint, out, target="tensorrt-rtx", recipe=recipe, block_size=block, kv_cache="static")
    convert(options)
    return out


@pytest.fixture(scope="session")
def dense(dense_checkpoint: Path) -> Path:
    """INT4, for TensorRT-RTX; tests that build into it take a copy."""
    return _converted(dense_checkpoint, dense_checkpoint.parent / "int4", "int4")


@pytest.fixture(scope="session")
def dense_fp8(dense_checkpoint: Path) -> Path:
    return _converted(dense_checkpoint, dense_checkpoint.parent / "fp8", "fp8")


@pytest.fixture(scope="session")
def scout(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with experts, chunked and global ones, INT4."""
    return _converted(scout_layout, tmp_path_factory.mktemp("engines") / "scout", "int4")


@pytest.fixture
def artifact(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "out"))


def retarget(out: Path, **fields: object) -> Path:
    """Let an artifact's manifest say something else."""
    manifest = read_manifest(out) | fields
    (out / "l4convert.json").write_bytes(encode_manifest(manifest))
    return out


@pytest.fixture
def stubbed(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """An artifact for the target tensorrt, and a builder of that name that behaves as it is told."""
    shutil.copy(Path(__file__).with_name("stub_builder.py"), tmp_path / "tensorrt.py")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("l4convert.engine.backend.present_capabilities", lambda: ("9.0",))

    def behave(mode: str) -> Path:
        monkeypatch.setenv("STUB", mode)
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        return retarget(artifact, target="tensorrt")

    return behave
