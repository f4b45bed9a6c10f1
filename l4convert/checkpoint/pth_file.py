"""Reading files of ``torch.save`` lazily and without running them: ``.pth``, ``.pt``.

The layout (``torch/serialization.py``, ``caffe2/serialize/inline_container.cc``): a zip archive of uncompressed entries
in one folder of any name. ``data.pkl`` is the pickled object, ``data/N`` the bytes of a storage, ``version`` and
``byteorder`` say how to read them. The pickle is read by :mod:`l4convert.checkpoint.state_pickle`, tensors stay in the
memory-mapped file.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from l4convert.checkpoint.combiners import Transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.remote import RemoteFile, RemoteReader, remote_file
from l4convert.checkpoint.safetensors_file import LFS_POINTER, FileState, Stored, file_state
from l4convert.checkpoint.state_names import PickledTensor
from l4convert.checkpoint.state_pickle import MAX_BYTES, read_state
from l4convert.checkpoint.text import quote, require_file, show
from l4convert.checkpoint.zip_directory import ZipEntry, read_directory
from l4convert.errors import InputError

DOWNLOAD_HINT = "download the checkpoint again, or finish the download"
LEGACY_HINT = "load it where you trust it with torch.load, and save it again with torch.save of torch 1.6 or later"
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)",
    re.ASCII,
)
_SMALL_BYTES = 64
_BLOCK_BYTES = 4096  # read of a file on a server at a time, for a few fields of its directory
_NEWEST_VERSION = 10  # caffe2/serialize/versions.h, kMaxSupportedFileFormatVersion


@dataclass(frozen=True)
class PthFile:
    """What a file holds.

    Attributes:
        path: The file.
        tensors: By their keys, in the order of the pickle.
        others: Keys of everything that is no tensor.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    others: tuple[str, ...]


def open_pth(path: Path) -> PthFile:
    """Read a file's directory and pickle, and check every tensor against the storage it is a view of.

    Raises:
        InputError: It is not a state dict as ``torch.save`` writes one, or not whole.
    """
    where = show(path)
    try:
        with _opened(path) as file:
            found = remote_file(path) or file_state(path, os.fstat(file.fileno()))
            _check_magic(file.read(len(LFS_POINTER)) if found.size else b"", where)
            entries = _entries(read_directory(file, found.size, where), where)
            _check_version(file, entries, where)
            pickle = entries["data.pkl"]
            if pickle.size > MAX_BYTES:
                raise InputError(
                    f"{where}: entry '{show(pickle.name)}' has {pickle.size:,} bytes, more than {MAX_BYTES:,}"
                )
            state = read_state(_content(file, pickle), f"{where}: entry '{show(pickle.name)}'")
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {show(error.strerror)}") from error
    tensors = {
        key: _tensor(found, where, key, value, entries)
        for key, value in state.items()
        if isinstance(value, PickledTensor)
    }
    return PthFile(path, tensors, tuple(key for key in state if key not in tensors))


def open_together(paths: Sequence[Path]) -> list[PthFile]:
    """:func:`open_pth` of several files; of those on a server at once, for each is asked for hundreds of places."""
    with ThreadPoolExecutor(max(1, sum(remote_file(path) is not None for path in paths))) as executor:
        return list(executor.map(open_pth, paths))


def _opened(path: Path) -> BinaryIO:
    if far := remote_file(path):
        return io.BufferedReader(RemoteReader(far), _BLOCK_BYTES)
    require_file(path, DOWNLOAD_HINT)
    return path.open("rb")


def _check_magic(begin: bytes, where: str) -> None:
    if begin.startswith(_ZIP):
        return
    if begin == LFS_POINTER:
        raise InputError(f"{where}: a Git LFS pointer, not the weights", "run `git lfs pull` in the checkpoint folder")
    if begin.startswith(_LEGACY):
        raise InputError(f"{where}: in torch's format from before 1.6, which is no zip archive", LEGACY_HINT)
    raise InputError(f"{where}: not a file of torch.save: it does not begin as a zip archive does", DOWNLOAD_HINT)


def _entries(directory: Mapping[str, ZipEntry], where: str) -> dict[str, ZipEntry]:
    """The entries by their names within the archive's folder."""
    folder = next(iter(directory), "").partition("/")[0]
    for name in directory:
        if not _ENTRY.fullmatch(name) or not name.startswith(f"{folder}/"):
            hint = "only files of torch.save with a state dict in them are read; TorchScript programs are not"
            raise InputError(f"{where}: entry '{show(name)}' is not one that torch.save writes", hint)
    entries = {name.partition("/")[2]: entry for name, entry in directory.items()}
    if "data.pkl" not in entries:
        raise InputError(f"{where}: a zip archive without data.pkl, not a file of torch.save", DOWNLOAD_HINT)
    return entries


def _check_version(file: BinaryIO, entries: Mapping[str, ZipEntry], where: str) -> None:
    known: dict[str, bytes] = {}
    for name in ("version", "byteorder"):
        if (entry := entries.get(name)) is not None:
            if entry.size > _SMALL_BYTES:
                raise InputError(f"{where}: entry '{show(entry.name)}' has {entry.size:,} bytes", DOWNLOAD_HINT)
            known[name] = _content(file, entry).strip()
    version = known.get("version", b"")
    if not version.isdigit() or not 1 <= int(version) <= _NEWEST_VERSION:
        raise InputError(f"{where}: version {quote(version)} of torch's format, which is not known", LEGACY_HINT)
    if (order := known.get("byteorder", b"little")) != b"little":
        hint = "save it again on a little-endian machine"
        raise InputError(f"{where}: byte order {quote(order)}; only little-endian files are read", hint)


def _content(file: BinaryIO, entry: ZipEntry) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.size)


def _tensor(
    file: FileState | RemoteFile, path: str, key: str, tensor: PickledTensor, entries: Mapping[str, ZipEntry]
) -> LazyTensor:
    """The tensor where it lies, after checking that it is all there; ``path``: as messages have it."""
    where = f"{path}: tensor '{show(key)}'"
    storage = tensor.storage
    entry = entries.get(f"data/{storage.key}")
    if entry is None:
        raise InputError(f"{where}: its storage {quote(storage.key)} is missing from the archive", DOWNLOAD_HINT)
    width = tensor.dtype.numpy().itemsize
    expected = storage.size * (1 if storage.dtype is None else width)
    if entry.size != expected:
        what = f"its storage must have {expected:,} bytes, entry '{show(entry.name)}' has {entry.size:,}"
        raise InputError(f"{where}: {what}", DOWNLOAD_HINT)
    end = (
        tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    )
    if math.prod(tensor.shape) and end * width > entry.size:
        what = f"its shape {list(tensor.shape)} with strides {list(tensor.strides)} reaches beyond its storage"
        raise InputError(f"{where}: {what} of {entry.size:,} bytes", DOWNLOAD_HINT)
    offset = entry.offset + tensor.offset * width
    if _contiguous(tensor.shape, tensor.strides):
        return Stored(file, key, tensor.dtype, tensor.shape, offset)
    shape, strides = (list(values) for values in (tensor.shape, tensor.strides))
    shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
    if len(shape) > 1 and _contiguous(shape, strides):
        return Transposed(Stored(file, key, tensor.dtype, tuple(shape), offset))
    what = f"a view with strides {list(tensor.strides)} for shape {list(tensor.shape)}"
    raise InputError(f"{where}: {what}, which cannot be read in place", "save it again after .contiguous()")


def _contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements follow each other in C order without gaps; an axis of one element has any stride."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
