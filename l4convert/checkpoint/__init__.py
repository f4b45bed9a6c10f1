"""Reading checkpoints: one file a format, one table of them, one form (:class:`Checkpoint`) that they are read into."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from l4convert.checkpoint import hf, meta
from l4convert.checkpoint.base import Checkpoint, Experts, Format
from l4convert.checkpoint.text import is_address, show
from l4convert.errors import InputError

__all__ = ["FORMATS", "Checkpoint", "Experts", "Format", "open_checkpoint"]

# The first that fits is taken.
FORMATS: tuple[Format, ...] = (
    Format("meta", meta.detect, meta.open_meta, "params.json and consolidated.NN.pth"),
    Format("hf", hf.detect, hf.open_hf, "config.json and *.safetensors"),
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any known format, checking everything that can be checked without reading weights.

    Args:
        path: A folder, or ``hf://org/name[@revision]``, a model on the Hugging Face Hub (the one slash that pathlib
            leaves of the two will do).

    Raises:
        InputError: No such folder or model, no known format, or anything wrong with what is in it.
        UsageError: It begins with ``hf://`` and names no model.
        BackendMissing: It is on the hub, and huggingface_hub is not installed.
    """
    if is_address(path):
        return _open_from_hub(path)
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


def _open_from_hub(path: Path) -> Checkpoint:
    from l4convert.checkpoint.hub import find_address, open_folder

    address = find_address(path)
    assert address is not None
    opened = open_folder(address)
    try:
        return dataclasses.replace(open_checkpoint(opened.folder), hub=opened.source)
    except InputError as error:
        if opened.unreachable is not None:
            error.hint = f"{opened.unreachable}, and the model is not whole in the cache"
        raise


def _require_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{show(path)}: no such folder", "a checkpoint is a folder on this machine; download it first")
    if not path.is_dir():
        raise InputError(
            f"{show(path)}: not a folder", "give the folder that holds the weights and config.json or params.json"
        )
    if next(path.iterdir(), None) is None:
        raise InputError(f"{show(path)}: the folder is empty", "download the checkpoint into it first")
