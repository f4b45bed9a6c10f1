"""Share weights with the checkpoint: its own files become files of the artifact, and no byte of them is copied.

A file that is shared is a reflink where the filesystem has them (its own inode, the same blocks), else a hard link.
Both stay whole when the checkpoint is deleted. docs/adr/0011-zero-copy.md has the measurements behind these rules.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from l4convert.checkpoint.combiners import Transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.safetensors_file import Stored
from l4convert.checkpoint.text import show
from l4convert.emit.staging import os_error, reported
from l4convert.errors import UsageError

SHARED_PREFIX = "checkpoint-"
# A file of which less is used is not shared: it would keep more disk occupied, when the checkpoint is deleted, than
# copies of what is used. A norm of ten kilobytes must not keep five gigabytes.
LEAST_USED = 0.5
# <linux/fs.h>: #define FICLONE _IOW(0x94, 9, int)
_FICLONE = 0x40049409
#: What a user can do who cannot share.
INSTEAD = "leave --share-weights out, and copies are written"


@dataclass(frozen=True)
class Choice:
    """Which tensors are shared.

    Attributes:
        shared: ``id`` of a tensor -> where its bytes are.
        written: Reason -> bytes of the tensors that are written, because of it.
    """

    shared: Mapping[int, Stored] = field(default_factory=dict)
    written: Mapping[str, int] = field(default_factory=dict)


def choose(tensors: Iterable[ir.TensorProtocol]) -> Choice:
    """Choose the tensors that a safetensors file holds just as the graph wants them, aligned as their type is.

    Args:
        tensors: Those that the artifact stores outside its graph.
    """
    candidates: dict[Path, dict[int, Stored]] = {}
    written: dict[str, int] = {}
    for tensor in tensors:
        reason = _why_written(tensor)
        if reason is None and isinstance(tensor, Stored):
            candidates.setdefault(tensor.file, {})[id(tensor)] = tensor
        elif reason is not None:
            written[reason] = written.get(reason, 0) + tensor.nbytes
    shared: dict[int, Stored] = {}
    for file, stored in candidates.items():
        used = sum({tensor.offset: tensor.nbytes for tensor in stored.values()}.values())
        if used >= LEAST_USED * _size(file):
            shared |= stored
        else:
            reason = f"in files of which less than {LEAST_USED:.0%} is used"
            written[reason] = written.get(reason, 0) + sum(tensor.nbytes for tensor in stored.values())
    return Choice(shared, written)


def shared_name(file: Path) -> str:
    """The name that a file of the checkpoint has in the artifact; no other file of one begins so."""
    return SHARED_PREFIX + file.name


def link(source: Path, target: Path) -> str:
    """Make ``target`` a file with the bytes of ``source``, which are not copied.

    Returns:
        ``reflink`` or ``hard link``.

    Raises:
        UsageError: The two are on different filesystems, or the system does not let this user link the file.
        InputError: Any other failure.
    """
    real = source.resolve()
    if _reflink(real, target):
        return "reflink"
    try:
        os.link(real, target)
    except OSError as error:
        raise _refusal(source, target.parent, error) from error
    return "hard link"


def try_link(source: Path, folder: Path) -> str:
    """What :func:`link` would do in a folder; nothing stays there.

    Raises:
        UsageError, InputError: As :func:`link`.
    """
    with reported(f"{folder}: cannot be written"), tempfile.TemporaryDirectory(dir=folder, prefix=".share-") as trial:
        return link(source, Path(trial) / "file")


def _why_written(tensor: ir.TensorProtocol) -> str | None:
    """Why a tensor cannot be shared, whatever else its file holds."""
    if isinstance(tensor, Stored) and tensor.file.suffix != ".safetensors":
        return "not in a safetensors file"
    if isinstance(tensor, Stored) and tensor.remote is not None:
        return "on the hub"
    if isinstance(tensor, Stored):
        aligned = tensor.offset % tensor.dtype.numpy().itemsize == 0
        return None if aligned else "not aligned"
    if isinstance(tensor, Transposed) and isinstance(tensor.parts[0], Stored):
        return "transposed"
    if isinstance(tensor, LazyTensor) and tensor.sources:
        return "computed"
    return "not from the checkpoint"


def _size(file: Path) -> int:
    with reported(f"{show(file)}: cannot be read"):
        return file.stat().st_size


def _reflink(source: Path, target: Path) -> bool:
    """Clone a file; False, and no ``target``, where the filesystem cannot."""
    if sys.platform != "linux":
        return False
    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except OSError:
        with suppress(OSError):
            target.unlink()
        return False
    return True


def _refusal(source: Path, folder: Path, error: OSError) -> Exception:
    what = f"{show(source)}: cannot be shared"
    if error.errno == errno.EXDEV:
        hint = f"write OUT to the checkpoint's filesystem, or {INSTEAD}"
        return UsageError(f"{what}: OUT would be on another filesystem", hint)
    if error.errno in {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK}:
        hint = f"Linux lets a user link only files that they own or may write to (fs.protected_hardlinks); {INSTEAD}"
        return UsageError(f"{what}: no hard link in {show(folder)}: {error.strerror}", hint)
    return os_error(what, error)
