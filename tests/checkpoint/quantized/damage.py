"""Changing quantized checkpoints: their tensors, and what config.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def with_tensors(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose tensors, torch's by name, were changed in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def with_settings(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose ``quantization_config`` was changed in place."""
    shutil.copytree(source, path)
    values = json.loads((path / "config.json").read_text())
    change(values["quantization_config"])
    (path / "config.json").write_text(json.dumps(values))
    return path
