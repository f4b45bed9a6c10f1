"""Lazy tensors made of others: transposed, stacked, side by side, cast.

Each only translates tile coordinates, and reads nothing until a tile is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.nibbles import transpose_packed


class Transposed(Derived):
    """Last two axes swapped."""

    def __init__(self, part: LazyTensor) -> None:
        *lead, rows, cols = part.dims
        super().__init__([part], part.dtype, [*lead, cols, rows])

    @property
    def by_columns(self) -> bool:
        return not self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(batch, cols, rows).T

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        if cols.stop % 2:
            return super().packed(batch, rows, cols)
        skipped = rows.start % 2  # its source has whole bytes only
        turned = transpose_packed(self.parts[0].packed(batch, cols, slice(rows.start - skipped, rows.stop)))
        return turned[skipped : skipped + rows.stop - rows.start]


def transposed(part: LazyTensor) -> LazyTensor:
    """``part`` with its last two axes swapped; swapping twice gives the original back."""
    return part.parts[0] if isinstance(part, Transposed) else Transposed(part)


class Reshaped(Derived):
    """The same bytes under another shape."""

    def __init__(self, part: LazyTensor, shape: Sequence[int]) -> None:
        super().__init__([part], part.dtype, shape, part.matrix)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(batch, rows, cols)

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].packed(batch, rows, cols)


class Stacked(Derived):
    """Equal matrices stacked on a new first axis (experts of one layer)."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        first = parts[0]
        super().__init__(parts, first.dtype, [len(parts), *first.dims])

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[batch].tile(0, rows, cols)

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[batch].packed(0, rows, cols)


class Member(Derived):
    """One matrix of a stack: ``part[index]`` of its first axis."""

    def __init__(self, part: LazyTensor, index: int) -> None:
        _, rows, cols = part.matrix
        super().__init__([part], part.dtype, part.dims[1:], (1, rows, cols))
        self.index = index

    @property
    def member(self) -> tuple[int, ...]:
        return (self.index, *self.parts[0].member)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(self.index, rows, cols)

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].packed(self.index, rows, cols)


class SideBySide(Derived):
    """Matrices of equal height joined along the last axis (gate and up)."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        first = parts[0]
        super().__init__(parts, first.dtype, [*first.dims[:-1], sum(p.dims[-1] for p in parts)])

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        pieces, begin = [], 0
        for part in self.parts:
            width = part.dims[-1]
            start, stop = max(cols.start - begin, 0), min(cols.stop - begin, width)
            if start < stop:
                pieces.append(part.tile(batch, rows, slice(start, stop)))
            begin += width
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)


class OnTop(Derived):
    """Matrices of equal width, one above the other: joined along the last but one axis."""

    def __init__(self, parts: Sequence[LazyTensor]) -> None:
        first = parts[0]
        height = sum(part.dims[-2] for part in parts)
        super().__init__(parts, first.dtype, [*first.dims[:-2], height, first.dims[-1]])

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._take(rows, lambda part, some: part.tile(batch, some, cols))

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._take(rows, lambda part, some: part.packed(batch, some, cols))

    def _take(self, rows: slice, rows_of_part: Callable[[LazyTensor, slice], np.ndarray]) -> np.ndarray:
        pieces, begin = [], 0
        for part in self.parts:
            height = part.matrix[1]
            start, stop = max(rows.start - begin, 0), min(rows.stop - begin, height)
            if start < stop:
                pieces.append(rows_of_part(part, slice(start, stop)))
            begin += height
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class InterleavedHalves(Derived):
    """Rows of the two halves taken in turn: [g0, g1, u0, u1] becomes [g0, u0, g1, u1] (ONNX Runtime's SwiGLU)."""

    def __init__(self, part: LazyTensor) -> None:
        super().__init__([part], part.dtype, part.dims)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._take(rows, lambda part: self.parts[0].tile(batch, part, cols))

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._take(rows, lambda part: self.parts[0].packed(batch, part, cols))

    def _take(self, rows: slice, rows_of_part: Callable[[slice], np.ndarray]) -> np.ndarray:
        half = self.matrix[1] // 2
        first, last = rows.start // 2, (rows.stop + 1) // 2
        gate, up = rows_of_part(slice(first, last)), rows_of_part(slice(half + first, half + last))
        both = np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])
        return both[rows.start - 2 * first : rows.stop - 2 * first]


class Mapped(Derived):
    """An elementwise function of one tensor: same tiling, perhaps another dtype."""

    def __init__(self, part: LazyTensor, function: Callable[[np.ndarray], np.ndarray], dtype: ir.DataType) -> None:
        super().__init__([part], dtype, part.dims, part.matrix)
        self._function = function

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._function(self.parts[0].tile(batch, rows, cols))


class Cast(Derived):
    """The same numbers in another element type, rounded to nearest even."""

    def __init__(self, part: LazyTensor, dtype: ir.DataType) -> None:
        super().__init__([part], dtype, part.dims, part.matrix)

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(batch, rows, cols).astype(self.dtype.numpy())


def cast(part: LazyTensor, dtype: ir.DataType) -> LazyTensor:
    """``part`` in another element type (round to nearest even); ``part`` itself where nothing changes."""
    return part if part.dtype == dtype else Cast(part, dtype)
