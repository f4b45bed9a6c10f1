"""Which reference a checkpoint is compared with: one row a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.adapters import merge_adapters
from l4convert.errors import InputError
from l4convert.parity.meta_reference import MetaReference
from l4convert.parity.reference import Reference, TransformersReference
from l4convert.runtime.runner import FloatArray, IntArray


class CheckpointReference(Reference, Protocol):
    """A reference that runs a checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        exact_angles: Whether RoPE's angles are computed in float64.
    """

    checkpoint: Checkpoint
    exact_angles: bool

    def shifted(self, ids: IntArray, start: int) -> FloatArray:
        """Logits of a text [tokens] whose first token is said to be at position ``start``."""
        ...


# Format of a checkpoint -> what makes its reference; ``exact_angles`` as for TransformersReference.
REFERENCES: Mapping[str, Callable[[Checkpoint, bool], CheckpointReference]] = {
    "hf": lambda checkpoint, exact_angles: TransformersReference(checkpoint, exact_angles=exact_angles),
    "meta": lambda checkpoint, exact_angles: MetaReference(checkpoint, exact_angles=exact_angles),
}


# Formats whose reference merges adapters with peft, which adapts transformers' models.
WITH_ADAPTERS = ("hf",)


def open_reference(path: Path, *, exact_angles: bool = False, adapters: Sequence[Path] = ()) -> CheckpointReference:
    """The reference for the checkpoint in a folder; it is a context manager.

    Args:
        path: The checkpoint's folder.
        exact_angles: Multiply position and frequency of RoPE in float64, where the reference itself does not.
        adapters: Folders of LoRA adapters that the reference merges, in their order.

    Raises:
        BackendMissing: What runs the reference is not installed.
        InputError: The checkpoint is not whole, or there is no reference for its format.
    """
    checkpoint = merge_adapters(open_checkpoint(path), adapters)
    make = REFERENCES.get(checkpoint.format)
    if make is None:
        known = ", ".join(REFERENCES)
        raise InputError(f"{path}: there is no reference for format {checkpoint.format}", f"there is for {known}")
    if adapters and checkpoint.format not in WITH_ADAPTERS:
        hint = "convert and compare with the same weights in Hugging Face format"
        raise InputError(f"{path}: the reference for format {checkpoint.format} takes no adapters", hint)
    return make(checkpoint, exact_angles)
