"""Reading safetensors files strictly and lazily.

The layout (https://github.com/huggingface/safetensors, "Format"): the header's length, a little-endian 64-bit
integer; the header, JSON that gives each tensor's dtype, shape and byte range; then the data, tensor after tensor
without gaps. Every range is checked against the file before anything is mapped, so that no header, wrong or hostile,
can make a later read leave the file.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint import remote
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.pages import read_tile
from l4convert.checkpoint.remote import RemoteFile, Span, remote_file
from l4convert.checkpoint.text import parse_object, quote, require_file, show
from l4convert.errors import InputError

# The reference implementation's own limit (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
# In a file, and in all files of a checkpoint. Known ones have at most the 46,080 of Maverick's experts, one by one
# and quantized, with all five tensors that a weight can then have.
MAX_TENSORS = 1 << 16
MAX_RANK = 8
MAX_DIM = 2**62
# Each mapping holds a file descriptor; systems commonly allow 1024 of them, and large models have hundreds of shards.
MAX_OPEN_FILES = 64
LFS_POINTER = b"version https://git-lfs"

DTYPES: Mapping[str, ir.DataType] = {
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "I8": ir.DataType.INT8,
    "I16": ir.DataType.INT16,
    "I32": ir.DataType.INT32,
    "I64": ir.DataType.INT64,
    "U8": ir.DataType.UINT8,
    "U16": ir.DataType.UINT16,
    "U32": ir.DataType.UINT32,
    "U64": ir.DataType.UINT64,
    "BOOL": ir.DataType.BOOL,
}
SAFETENSORS_NAMES: Mapping[ir.DataType, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileState:
    """A file as it was when its header was read; a mapping made later must find the same one."""

    path: str
    size: int
    modified_ns: int


class Stored(LazyTensor):
    """A tensor in a file; tiles are read-only views of the memory-mapped file (possibly unaligned).

    Of a file on a server, they are copies.

    Args:
        state: The file as it was when it was seen that the tensor fits into it.
        key: The tensor's name in it.
        dtype: Of its elements, little-endian.
        shape: In C order, without gaps.
        offset: Where it begins, in bytes from the beginning of the file.

    Attributes:
        file: The file.
        offset: Where its data begins, in bytes from the beginning of the file.
        key: Its name in the file.
    """

    def __init__(
        self, state: FileState | RemoteFile, key: str, dtype: ir.DataType, shape: tuple[int, ...], offset: int
    ) -> None:
        super().__init__(dtype, shape, name=key)
        self.file = _path(state.path)
        self.key = key
        self.offset = offset
        self._state = state

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def viewed(self, shape: tuple[int, ...]) -> Stored:
        """The same bytes as a tensor of another shape and the same size."""
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.key}: {self.dims} cannot be seen as {shape}")
        return Stored(self._state, self.key, self.dtype, shape, self.offset)

    @property
    def remote(self) -> RemoteFile | None:
        """The file on a server that holds it; None where it is on this machine."""
        return self._state if isinstance(self._state, RemoteFile) else None

    def require_unchanged(self) -> None:
        """See whether the file is still the one whose header was read; one on a server is looked at when it is read.

        Raises:
            InputError: It was changed or cannot be read.
        """
        if isinstance(self._state, RemoteFile):
            return
        try:
            _require_same(self._state, self.file.stat())
        except OSError as error:
            raise InputError(f"{show(self.file)}: cannot be read: {show(error.strerror)}") from error

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        if not self.size:
            return np.empty(self.matrix, self.dtype.numpy())[batch, rows, cols]
        offset = self.offset + batch * (self.nbytes // self.matrix[0])
        if isinstance(self._state, RemoteFile):
            span = Span(self._state, self.offset, self.offset + self.nbytes)
            return remote.read_tile(span, offset, self.matrix[1:], self.dtype.numpy(), rows, cols)
        file = _mapped(self._state)
        matrix: np.ndarray = np.ndarray(self.matrix[1:], self.dtype.numpy(), buffer=file.data, offset=offset)
        try:
            return read_tile(file, matrix, rows, cols)
        except OSError as error:
            message = f"{show(self._state.path)}: tensor '{show(self.key)}': cannot be read: {error.strerror}"
            raise InputError(message, "check the disk, or download the file again") from error


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Read a file's header.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        InputError: The file is not exactly one well-formed safetensors file.
    """
    state: FileState | RemoteFile
    if far := remote_file(path):
        state = far
        length, header = _read_header(path, lambda start, nbytes: far.read(start, start + nbytes), far.size)
    else:
        state, length, header = _open_file(path)
    if len(header) > MAX_TENSORS:
        raise InputError(f"{show(path)}: {len(header):,} tensors, more than the {MAX_TENSORS:,} that a model can have")
    data = 8 + length
    entries = [_entry(path, name, fields) for name, fields in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_coverage(path, entries, state.size - data)
    return {entry.name: Stored(state, entry.name, entry.dtype, entry.shape, data + entry.begin) for entry in entries}


def _open_file(path: Path) -> tuple[FileState, int, dict[str, Any]]:
    """A file of this machine: its state, and the length and content of its header."""
    require_file(path, "download the checkpoint again, or finish the download")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            header = _read_header(path, lambda _, nbytes: file.read(nbytes), status.st_size)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error.strerror)}") from error
    return file_state(path, status), *header


def file_state(path: Path, status: os.stat_result) -> FileState:
    """What is kept in mind of a file that is open."""
    return FileState(str(path), status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header; ``begin`` and ``end`` are bytes from the beginning of the data."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    begin: int
    end: int


def _read_header(path: Path, read: Callable[[int, int], bytes], size: int) -> tuple[int, dict[str, Any]]:
    """``read`` gives bytes of the file, in their order: from where, and how many."""
    where = show(path)
    if size < 8:  # also a file of procfs, which could keep its reader waiting
        raise InputError(f"{where}: not a safetensors file: {size} bytes", "finish the download")
    prefix = read(0, 8)
    if LFS_POINTER.startswith(prefix):
        raise InputError(f"{where}: a Git LFS pointer, not the weights", "run `git lfs pull` in the checkpoint folder")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(f"{where}: not a safetensors file: its header would be {length:,} bytes long")
    if 8 + length > size:
        missing = 8 + length - size
        raise InputError(f"{where}: truncated inside the header, {missing:,} bytes missing", "download it again")
    return length, parse_object(read(8, length), f"{where}: safetensors header")


def _entry(path: Path, name: str, fields: Any) -> _Entry:
    where = f"{show(path)}: tensor '{show(name)}'"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise InputError(f"{where}: its header entry lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{where}: unknown dtype {quote(fields['dtype'])}", f"known: {', '.join(DTYPES)}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise InputError(f"{where}: shape {quote(shape)} is not a list of at most {MAX_RANK} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets {quote(offsets)} are not a begin and an end")
    expected = math.prod(shape) * dtype.numpy().itemsize
    if offsets[1] - offsets[0] != expected:
        found = offsets[1] - offsets[0]
        raise InputError(
            f"{where}: {fields['dtype']} {show(shape)} takes {expected:,} bytes, data_offsets give {found:,}"
        )
    return _Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_DIM for value in values)


def _check_coverage(path: Path, entries: list[_Entry], size: int) -> None:
    """The entries, in order of their data, must cover ``size`` bytes with neither gap nor overlap."""
    end = max((entry.end for entry in entries), default=0)
    if end > size:
        broken = next(entry for entry in entries if entry.end > size)
        what = f"truncated, {end - size:,} bytes missing; tensor '{show(broken.name)}' is the first that is cut"
        raise InputError(f"{show(path)}: {what}", "download it again")
    position = 0
    for entry in entries:
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves unused bytes before it"
            raise InputError(f"{show(path)}: tensor '{show(entry.name)}' {fault} (at byte {entry.begin:,} of the data)")
        position = entry.end
    if position < size:
        raise InputError(f"{show(path)}: {size - position:,} bytes after the last tensor belong to none")


@lru_cache(maxsize=MAX_OPEN_FILES)
def _path(path: str) -> Path:
    """One object for all tensors of a file: making it is what takes longest in reading a header."""
    return Path(path)


def _require_same(state: FileState, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (state.size, state.modified_ns):
        raise InputError(f"{show(state.path)}: changed since it was opened", "start again")


@lru_cache(maxsize=MAX_OPEN_FILES)
def _mapped(state: FileState) -> np.ndarray:
    """The file's bytes, uint8; read-only. One dropped from the cache lives on as long as an array looks into it."""
    try:
        with Path(state.path).open("rb") as file:
            _require_same(state, os.fstat(file.fileno()))
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise InputError(f"{show(state.path)}: cannot be read: {show(error.strerror)}") from error
