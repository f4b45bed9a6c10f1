"""Atomic output folders: everything is written beside the destination and renamed into place when it is whole.

Beside ``OUT`` lives, while a run lasts, one folder::

    .OUT.partial/lock       held with flock by the running process; its text says which
    .OUT.partial/artifact   what becomes OUT
    .OUT.partial/journal    which parts of it are written (:mod:`l4convert.emit.journal`)
    .OUT.partial/old        what was OUT, between the two renames of an overwriting run

A run that was killed, interrupted, or stopped by a failing disk leaves that folder and nothing else; the next run on
the same output goes on from it, first putting ``old`` back if a kill fell between the two renames.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from l4convert.errors import InputError, UsageError

MANIFEST_FILE = "l4convert.json"
JOURNAL_FILE = "journal"


@dataclass
class Staging:
    """A locked place to write to. ``folder`` becomes ``out`` when :meth:`publish` is called.

    Attributes:
        keep: Whether what was not published when the context ends is left for another run to continue.
    """

    room: Path
    folder: Path
    out: Path
    keep: bool

    @property
    def journal(self) -> Path:
        return self.room / JOURNAL_FILE

    def clear(self) -> None:
        """Forget what an earlier run left.

        Raises:
            OSError: It cannot be removed.
        """
        self.keep = False
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def publish(self) -> None:
        """Put the folder in place, after it and its files have reached the disk.

        Raises:
            OSError: The rename failed; ``out`` is then as it was before.
        """
        for path in sorted(self.folder.iterdir()):
            sync(path)
        sync(self.folder)
        old = self.room / "old"
        replaces = self.out.exists()
        if replaces:
            self.out.rename(old)
        try:
            self.folder.rename(self.out)
        except OSError:
            if replaces:
                old.rename(self.out)
            raise
        self.keep = False
        sync(self.out.parent)
        if replaces:
            shutil.rmtree(old)


def check_destination(out: Path, overwrite: bool, keep_clear_of: Sequence[Path] = ()) -> None:
    """Refuse destinations that would destroy or mix with something else; callers may ask long before they write.

    Raises:
        UsageError: ``out`` exists (without ``overwrite``, or it is no artifact), is a mount point, or it and one of the
            folders ``keep_clear_of`` lie inside each other.
        InputError: The filesystem does not let itself be asked.
    """
    with reported(f"{out}: cannot be used"):
        _check_destination(out, overwrite, keep_clear_of)


def _check_destination(out: Path, overwrite: bool, keep_clear_of: Sequence[Path]) -> None:
    real = Path(os.path.realpath(out))
    for folder in keep_clear_of:
        source = Path(os.path.realpath(folder))
        if real.is_relative_to(source) or source.is_relative_to(real):
            raise UsageError(f"{out}: the output folder must not be, lie in or contain the checkpoint {folder}")
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(f"{out}: exists already", hint="choose another output folder, or pass --overwrite")
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; an artifact is a folder")
    if not (out / MANIFEST_FILE).is_file() and any(out.iterdir()):
        raise UsageError(
            f"{out}: is not replaced, because it holds something else than an l4convert artifact (no {MANIFEST_FILE})",
            hint="choose another output folder, or empty this one yourself",
        )
    if os.path.ismount(real):
        raise UsageError(f"{out}: is a mount point, which cannot be replaced", hint=f"choose {out / 'artifact'}")


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Staging]:
    """Lock ``out`` and give a folder to fill: an empty one, or where ``keep`` is set, what an earlier run left.

    What was not published when the context ends is removed, unless ``keep`` is set by then.

    Raises:
        UsageError: Another process is writing the same output, or ``out`` appeared meanwhile.
        InputError: The parent folder cannot be written to.
    """
    room = out.parent / f".{out.name}.partial"
    with reported(f"{room}: cannot be created"):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(room, out)
    staging = Staging(room, room / "artifact", out, keep=(room / JOURNAL_FILE).exists())
    try:
        with reported(f"{room}: what a killed run left cannot be removed"):
            _recover(staging)
        check_destination(out, overwrite)
        with reported(f"{staging.folder}: cannot be created"):
            staging.folder.mkdir(exist_ok=True)
        yield staging
    finally:
        if not staging.keep:
            shutil.rmtree(staging.folder, ignore_errors=True)
            staging.journal.unlink(missing_ok=True)
        (room / "lock").unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
        if not staging.keep and not (room / "old").exists():
            shutil.rmtree(room, ignore_errors=True)
        os.close(lock)


def check_free_disk(folder: Path, needed: int) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        InputError: The filesystem of ``folder`` has fewer than ``needed`` bytes free for this user.
    """
    with reported(f"{folder}: free space cannot be read"):
        free = shutil.disk_usage(folder).free
    require_free_disk(folder.parent.parent, needed, free)


def require_free_disk(where: Path, needed: int, free: int) -> None:
    """Refuse, naming the missing bytes, when fewer than ``needed`` bytes are ``free`` in the folder ``where``.

    Raises:
        InputError: They are.
    """
    if free < needed:
        raise InputError(
            f"{where}: {needed} bytes are needed, {free} are free: {needed - free} too few",
            hint="free some disk space, or write to another filesystem",
        )


def allocated_bytes(path: Path) -> int:
    """Bytes of disk that a file occupies; 0 where there is none."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn any OSError of the block into an InputError that begins with ``what``."""
    try:
        yield
    except OSError as error:
        raise os_error(what, error) from error


def os_error(what: str, error: OSError) -> InputError:
    """One line for an OSError, with a hint where its kind has a usual remedy."""
    hints = {
        errno.ENOSPC: "free some disk space, or write to another filesystem",
        errno.EDQUOT: "free some of your disk quota, or write to another filesystem",
        errno.EACCES: "check the permissions of the folder",
        errno.EROFS: "the filesystem is read-only: choose another output folder",
        errno.EIO: "the disk reports an error: check it before trying again",
    }
    return InputError(f"{what}: {error.strerror or error}", hint=hints.get(error.errno or 0))


def _lock(room: Path, out: Path) -> int:
    """Open and lock ``room/lock``, making both; the lock lasts until the descriptor is closed or the process dies."""
    if room.is_symlink():
        raise UsageError(f"{room}: is a symbolic link; remove it")
    path = room / "lock"
    while True:
        room.mkdir(exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # another process finished and removed the room in between
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise UsageError(f"{out}: is being written by {holder}", hint="wait for it, or end it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _recover(staging: Staging) -> None:
    """Clear what a killed run left and cannot be continued.

    An artifact that it was replacing goes back if nothing took its place yet. Weights stay if they have a journal.
    """
    old = staging.room / "old"
    if old.exists() and not staging.out.exists():
        old.rename(staging.out)
    if old.exists():
        shutil.rmtree(old)
    if not staging.folder.exists() or not staging.keep:
        staging.keep = False
        staging.journal.unlink(missing_ok=True)
        if staging.folder.exists():
            shutil.rmtree(staging.folder)
