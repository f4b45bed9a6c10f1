"""Reading checkpoints: one file a format, one table of them, one form (:class:`Checkpoint`) that they are read into."""

from __future__ import annotations

from pathlib import Path

from l4convert.checkpoint import hf, meta
from l4convert.checkpoint.base import Checkpoint, Experts, Format
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

__all__ = ["FORMATS", "Checkpoint", "Experts", "Format", "open_checkpoint"]

# The first that fits is taken.
FORMATS: tuple[Format, ...] = (
    Format("meta", meta.detect, meta.open_meta, "params.json and consolidated.NN.pth"),
    Format("hf", hf.detect, hf.open_hf, "config.json and *.safetensors"),
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint folder of any known format, checking everything that can be checked without reading weights.

    Raises:
        InputError: No such folder, no known format, or anything wrong with what is in it.
    """
    path = Path(path)
    try:
        _require_folder(path)
        for row in FORMATS:
            if row.detect(path):
                return row.open(path)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error.strerror)}") from error
    tried = "; ".join(f"{row.name} ({row.looks_like})" for row in FORMATS)
    raise InputError(f"{show(path)}: not a checkpoint of a known format", f"looked for: {tried}")


def _require_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{show(path)}: no such folder", "a checkpoint is a folder on this machine; download it first")
    if not path.is_dir():
        raise InputError(
            f"{show(path)}: not a folder", "give the folder that holds the weights and config.json or params.json"
        )
    if next(path.iterdir(), None) is None:
        raise InputError(f"{show(path)}: the folder is empty", "download the checkpoint into it first")
