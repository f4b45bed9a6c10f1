"""Whether what would be written fits where it would be written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from l4convert.emit.staging import reported, require_free_disk


@dataclass(frozen=True)
class DiskPlan:
    """Disk that a conversion needs, and that is there.

    Attributes:
        needed: Bytes of all files, and a reserve for the manifest.
        folder: The nearest folder above the output that exists; None where no output was named.
        free: Bytes there for this user, with those that an interrupted run on the same output still holds.
    """

    needed: int
    folder: Path | None
    free: int | None

    @property
    def missing(self) -> int:
        """Bytes too few; 0 where it fits or nothing is known."""
        return 0 if self.free is None else max(0, self.needed - self.free)

    def check(self) -> None:
        """Refuse what the conversion itself would refuse before it starts.

        Raises:
            InputError: There are too few bytes free; the message says how many are missing.
        """
        if self.folder is not None and self.free is not None:
            require_free_disk(self.folder, self.needed, self.free)


def plan_disk(needed: int, out: Path | None) -> DiskPlan:
    """Look at the filesystem on which ``out`` would be made.

    Raises:
        InputError: It does not let itself be asked.
    """
    if out is None:
        return DiskPlan(needed, None, None)
    folder = existing_parent(out)
    with reported(f"{folder}: free space cannot be read"):
        return DiskPlan(needed, folder, shutil.disk_usage(folder).free + _left_over(out))


def existing_parent(out: Path) -> Path:
    """The nearest folder above ``out`` that exists."""
    return next(folder for folder in Path(os.path.realpath(out)).parents if folder.is_dir())


def _left_over(out: Path) -> int:
    """Bytes on disk of what an interrupted run on this output left, which the next one removes or continues."""
    real = Path(os.path.realpath(out))
    room = real.parent / f".{real.name}.partial" / "artifact"
    left = [path.lstat() for path in room.iterdir()] if room.is_dir() else []
    return sum(status.st_blocks * 512 for status in left if status.st_nlink == 1)  # a file of the checkpoint has more
