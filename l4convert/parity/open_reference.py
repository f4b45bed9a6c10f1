"""Which reference a checkpoint is compared with: one row a format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.errors import InputError
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
}


def open_reference(path: Path, *, exact_angles: bool = False) -> CheckpointReference:
    """The reference for the checkpoint in a folder; it is a context manager.

    Args:
        path: The checkpoint's folder.
        exact_angles: Multiply position and frequency of RoPE in float64, where the reference itself does not.

    Raises:
        BackendMissing: What runs the reference is not installed.
        InputError: The checkpoint is not whole, or there is no reference for its format.
    """
    checkpoint = open_checkpoint(path)
    make = REFERENCES.get(checkpoint.format)
    if make is None:
        known = ", ".join(REFERENCES)
        raise InputError(f"{path}: there is no reference for format {checkpoint.format}", f"there is for {known}")
    return make(checkpoint, exact_angles)
