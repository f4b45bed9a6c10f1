"""Ways to change a checkpoint on disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
needs_links = pytest.mark.skipif(sys.platform == "win32", reason="making links needs a privilege on Windows")


def copy_of(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "checkpoint"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors file's dict of tensors in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_map(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(path / INDEX, lambda index: change(index["weight_map"]))


def set_file(path: Path, tensor: str, file: Any) -> None:
    edit_map(path, lambda weights: weights.update({tensor: file}))


def everywhere(path: Path, change: Callable[[dict[str, Any]], object], shard: str = FIRST) -> None:
    """Change one shard's tensors and the index with it."""
    before = load_file(path / shard).keys()
    edit(path / shard, change)
    after = load_file(path / shard).keys()
    edit_map(path, lambda weights: [weights.pop(name) for name in before - after])
    edit_map(path, lambda weights: weights.update(dict.fromkeys(after, shard)))


def replace(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = json.loads((path / INDEX).read_text())["weight_map"][name]
    edit(path / shard, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def drop(path: Path, *names: str) -> None:
    for shard in (FIRST, SECOND, THIRD):
        everywhere(path, lambda tensors: [tensors.pop(name, None) for name in names], shard)


def cut(file: Path, length: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(length if length >= 0 else file.stat().st_size + length)


def relink(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)
