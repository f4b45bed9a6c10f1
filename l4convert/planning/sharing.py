"""What of an artifact would stay in the checkpoint's own files, and why the rest would not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l4convert.emit.plan import WeightsPlan, stored_of
from l4convert.emit.share import INSTEAD, try_link
from l4convert.emit.staging import reported
from l4convert.errors import UsageError
from l4convert.planning.disk import existing_parent


@dataclass(frozen=True)
class SharingPlan:
    """What is shared.

    Attributes:
        tensors, bytes: Number and size of the shared tensors.
        files: Name in the artifact -> bytes of the whole file.
        by: ``reflink`` or ``hard link``; None where no output was named.
        written: Bytes of the other tensors, by the reason why they are written.
    """

    tensors: int
    bytes: int
    files: Mapping[str, int]
    by: str | None
    written: Mapping[str, int]


def plan_sharing(weights: WeightsPlan, out: Path | None) -> SharingPlan:
    """Describe the sharing of a plan, and see whether it can be done where the artifact is to be made.

    Raises:
        UsageError: Nothing can be shared: no tensor stays as it is, or ``out`` would be on another filesystem.
        InputError: The folder in which ``out`` would be made cannot be written to.
    """
    if not weights.shared:
        whole = max(1, sum(weights.unshared.values()))
        reasons = sorted(weights.unshared.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{nbytes / whole:.1%} {reason}" for reason, nbytes in reasons)
        hint = f"most is shared with recipe none and target portable; else {INSTEAD}"
        raise UsageError(f"no weight of this conversion can stay in the checkpoint's files: {shares}", hint)
    sources = {planned.file: stored_of(planned).file for planned in weights.shared}
    sizes = {}
    for name, path in sources.items():
        with reported(f"{path}: cannot be read"):
            sizes[name] = path.stat().st_size
    by = None if out is None else try_link(next(iter(sources.values())), existing_parent(out))
    total = sum(planned.nbytes for planned in weights.shared)
    return SharingPlan(len(weights.shared), total, sizes, by, weights.unshared)
