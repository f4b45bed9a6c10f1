"""Lazy tensors: recipes that know their dtype and shape, and compute any tile of their content on demand.

Every weight in a graph is a :class:`LazyTensor`. It is stored (or would be) as ``batch`` matrices of ``rows`` x
``cols`` in C order; :meth:`LazyTensor.tile` computes one rectangle of one of those matrices. Those made of others
(``combiners.py``) only translate tile coordinates, so a 2 TB model is planned without reading a byte, and is written
tile by tile in bounded memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

# How much of a tensor is computed at a time when it is written: large enough for good I/O, small enough that a handful
# of float32 temporaries of a tile stay far below any memory limit.
TILE_ELEMENTS = 1 << 22

# Packed together, so that temporaries stay in a core's cache.
_CACHED_PAIRS = 1 << 16
_CACHED_COLUMNS = 256

_UNPACKED_UINT8 = {ir.DataType.INT4, ir.DataType.UINT4}


class LazyTensor(ir.TensorProtocol):
    """A tensor whose content is computed tile by tile; usable wherever onnx_ir takes a tensor.

    Args:
        dtype: Element type. 4-bit types are one element per array item in memory and are packed by :meth:`tobytes`.
        shape: The shape that the ONNX graph sees.
        matrix: ``(batch, rows, cols)`` of the tiling; default: the last two axes of ``shape``. The product must be the
            tensor's size, and C order of both must agree.
        name: Set by the graph that uses it.
    """

    def __init__(
        self,
        dtype: ir.DataType,
        shape: Sequence[int],
        matrix: tuple[int, int, int] | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name
        self.doc_string: str | None = None
        self.dtype = dtype
        self.shape = ir.Shape(shape)
        self.dims: tuple[int, ...] = tuple(shape)
        self.matrix = matrix if matrix is not None else matrix_of(shape)
        if math.prod(self.matrix) != math.prod(self.dims):
            raise ValueError(f"{name}: tiling {self.matrix} does not cover shape {self.dims}")
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors it is computed from."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The checkpoint's files that hold those."""
        return ()

    @property
    def member(self) -> tuple[int, ...]:
        """Which part of its sources it is, where it is a :class:`Member` of a stack; () where it is the whole."""
        return ()

    @property
    def by_columns(self) -> bool:
        """Whether a block of its columns, not of its rows, is what follows from a block of its sources' rows."""
        return False

    @property
    def may_be_infinite(self) -> bool:
        """Whether infinity has a meaning in it, as in a mask; in a weight it has none."""
        return False

    @property
    def origin(self) -> str:
        """The first of them, as an error names it: "model-00001.safetensors: tensor 'a.weight'"."""
        name = f"tensor {(self.sources or (self.name or 'without a name',))[0]!r}"
        return f"{self.files[0].name}: {name}" if self.files else name

    @abstractmethod
    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        """Compute ``matrix[batch][rows, cols]``; slices have explicit bounds and step 1.

        Returns:
            A 2-D array of the numpy type of ``dtype``; may be a read-only view.
        """

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        """A tile of a 4-bit tensor, two elements of a row to a byte, the earlier one in the low nibble.

        Args:
            batch: As for :meth:`tile`.
            rows: Likewise.
            cols: Likewise, but it starts at an even column, and ends at one or at the end of the rows.

        Returns:
            uint8 [rows, ceil(cols / 2)]; the upper nibble after an odd end is 0.
        """
        return pack_rows(self.tile(batch, rows, cols))

    # --- onnx_ir's tensor protocol -------------------------------------------------------------------------------

    @property
    def raw(self) -> LazyTensor:
        return self

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return math.ceil(self.dtype.itemsize * self.size)

    def numpy(self) -> np.ndarray:
        """The whole tensor, shaped; only for tensors known to be small, and for tests."""
        batch, rows, cols = self.matrix
        whole = [self.tile(b, slice(0, rows), slice(0, cols)) for b in range(batch)]
        return np.stack(whole).reshape(self.dims) if whole else np.empty(self.dims, self.dtype.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        return b"".join(data for _, data in self.chunks())

    def chunks(self, elements: int = TILE_ELEMENTS) -> Iterator[tuple[int, bytes]]:
        """Yield ``(byte offset, bytes)`` in storage order (little-endian; 4-bit types packed low nibble first).

        Args:
            elements: About how many elements to compute at a time. One row is the least.
        """
        batch, rows, cols = self.matrix
        if self.dtype in _UNPACKED_UINT8 and cols % 2:
            yield 0, pack_nibbles(self.numpy().reshape(-1))  # rows share bytes, so they cannot be written apart
            return
        step = max(1, min(rows, elements // max(cols, 1)))
        row_bytes = int(cols * self.dtype.itemsize)
        for b in range(batch):
            for start in range(0, rows, step):
                part = (b, slice(start, min(start + step, rows)), slice(0, cols))
                data = self.packed(*part) if self.dtype in _UNPACKED_UINT8 else self.tile(*part)
                yield (b * rows + start) * row_bytes, data.tobytes()

    def __repr__(self) -> str:
        return f"{type(self).__name__}<{self.dtype},{list(self.dims)}>({self.name})"


def matrix_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """The ``(batch, rows, cols)`` of a shape: its last two axes, the others flattened into ``batch``."""
    if len(shape) < 2:
        return (1, 1, math.prod(shape))
    return (math.prod(shape[:-2]), shape[-2], shape[-1])


def array_bytes(array: np.ndarray, dtype: ir.DataType) -> bytes | memoryview:
    """The storage bytes of an array, as a copy: little-endian, 4-bit types packed two to a byte."""
    if dtype in _UNPACKED_UINT8:
        return pack_nibbles(array.reshape(-1))
    if array.ndim != 2 or array.flags.c_contiguous:
        return array.tobytes()
    copy = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], _CACHED_COLUMNS):  # a transposed matrix takes half the time in such blocks
        columns = slice(start, start + _CACHED_COLUMNS)
        copy[:, columns] = array[:, columns]
    return copy.reshape(-1).view(np.uint8).data


def pack_nibbles(flat: np.ndarray) -> bytes:
    """Pack 4-bit elements, the first in the low nibble (ONNX spec, "4 bit types"); an odd tail is padded with zero."""
    return pack_rows(flat.reshape(1, -1)).tobytes()


def pack_rows(elements: np.ndarray) -> np.ndarray:
    """Pack [R, n] 4-bit or integer elements into uint8 [R, ceil(n / 2)]; only the low four bits of an element count."""
    if elements.itemsize != 1:
        elements = elements.astype(np.int8)
    rows, cols = elements.shape
    if cols % 2:
        elements = np.pad(elements.view(np.uint8), ((0, 0), (0, 1)))
    pairs = np.ascontiguousarray(elements).view("<u2")  # both elements at once, the first one in the low byte
    result = np.empty((rows, (cols + 1) // 2), np.uint8)
    step = max(1, _CACHED_PAIRS // max(1, pairs.shape[1]))
    for start in range(0, rows, step):
        some = pairs[start : start + step]
        np.copyto(result[start : start + step], (some & 0x0F) | ((some >> 4) & 0xF0), casting="unsafe")
    return result


class Constant(LazyTensor):
    """A small array that is already in memory."""

    def __init__(self, array: np.ndarray, name: str | None = None) -> None:
        super().__init__(ir.DataType.from_numpy(array.dtype), array.shape, name=name)
        self._array = array.reshape(self.matrix)

    @property
    def sources(self) -> tuple[str, ...]:
        return ()

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._array[batch, rows, cols]


class Derived(LazyTensor):
    """A lazy tensor computed from other lazy tensors, its ``parts``."""

    def __init__(
        self,
        parts: Sequence[LazyTensor],
        dtype: ir.DataType,
        shape: Sequence[int],
        matrix: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(dtype, shape, matrix)
        self.parts = tuple(parts)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts for name in part.sources))

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files))

    @property
    def member(self) -> tuple[int, ...]:
        return self.parts[0].member if len(self.parts) == 1 else ()
