"""Weights of an ONNX model as lazy tensors: bytes of the model itself, or a range of a memory-mapped file beside it."""

from __future__ import annotations

import mmap
import os
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.pages import read_tile
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

# Each mapping holds a file descriptor; exporters write one file, or one a tensor.
MAX_OPEN_FILES = 64
NIBBLES = {ir.DataType.INT4, ir.DataType.UINT4}


@dataclass(frozen=True)
class FileState:
    """A file as it was when the model was read; a mapping made later must find the same one."""

    path: Path
    size: int
    modified_ns: int


class Leaf(LazyTensor):
    """A tensor whose bytes, little-endian and in C order as ONNX stores them, begin somewhere in a buffer.

    Args:
        name: Its name in the model.
        model: The model's file.
        dtype: Element type; 4-bit types are packed two to a byte, the earlier one in the low nibble.
        shape: Of the tensor.
        offset: Of its first byte in the buffer.
    """

    def __init__(self, name: str, model: Path, dtype: ir.DataType, shape: tuple[int, ...], offset: int) -> None:
        super().__init__(dtype, shape, name=name)
        self.key = name
        self.offset = offset
        self._model = model

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._model,)

    @property
    def may_be_infinite(self) -> bool:
        return True  # exporters fold masks of a fixed length into such constants

    @abstractmethod
    def _buffer(self) -> np.ndarray:
        """The bytes that hold it, uint8."""

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        if not self.size:
            return np.empty(self.matrix, self.dtype.numpy())[batch, rows, cols]
        if self.dtype in NIBBLES:
            return self._unpacked()[batch, rows, cols]
        offset = self.offset + batch * (self.nbytes // self.matrix[0])
        matrix: np.ndarray = np.ndarray(self.matrix[1:], self.dtype.numpy(), buffer=self._buffer(), offset=offset)
        return self._read(matrix, rows, cols)

    def _read(self, matrix: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
        return matrix[rows, cols]

    def _unpacked(self) -> np.ndarray:
        """All elements of a 4-bit tensor, one to a byte: such a tensor is quantized already, and written as it is."""
        packed = self._buffer()[self.offset : self.offset + self.nbytes]
        halves = np.stack([packed & 0x0F, packed >> 4], axis=1).reshape(-1)[: self.size]
        if self.dtype == ir.DataType.INT4:
            halves = ((halves.astype(np.int8) ^ 8) - 8).astype(np.int8)
        return halves.astype(self.dtype.numpy()).reshape(self.matrix)


class Inline(Leaf):
    """A tensor in the model's own file."""

    def __init__(self, name: str, model: Path, dtype: ir.DataType, shape: tuple[int, ...], data: bytes) -> None:
        super().__init__(name, model, dtype, shape, 0)
        self._data = data

    def _buffer(self) -> np.ndarray:
        return np.frombuffer(self._data, np.uint8)


class External(Leaf):
    """A tensor in a file beside the model."""

    def __init__(self, name: str, state: FileState, dtype: ir.DataType, shape: tuple[int, ...], offset: int) -> None:
        super().__init__(name, state.path, dtype, shape, offset)
        self._state = state

    def _buffer(self) -> np.ndarray:
        return mapped(self._state)

    def _read(self, matrix: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
        try:
            return read_tile(self._buffer(), matrix, rows, cols)
        except OSError as error:
            message = f"{show(self._state.path)}: tensor '{show(self.key)}': cannot be read: {error.strerror}"
            raise InputError(message, "check the disk, or copy the file again") from error


@lru_cache(maxsize=MAX_OPEN_FILES)
def mapped(state: FileState) -> np.ndarray:
    """The file's bytes, uint8, read-only.

    Raises:
        InputError: It cannot be read, or is not the file it was.
    """
    try:
        with state.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (state.size, state.modified_ns):
                raise InputError(f"{show(state.path)}: changed since it was opened", "start again")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise InputError(f"{show(state.path)}: cannot be read: {show(error.strerror)}") from error
