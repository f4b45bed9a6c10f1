"""Weights with low-rank updates added, computed tile by tile.

The arithmetic is fixed to the bit, so that the same bytes are written on every machine and whatever the tiles:
``base + scale * B @ A`` is computed in float64 (:mod:`l4convert.quantization.lowrank`) and kept in float32 from one
adapter to the next; at the end it is rounded to the base's dtype, once. docs/adr/0025-adapters.md compares it with what
peft does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from l4convert.checkpoint.finite import count_broken
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.errors import InputError
from l4convert.quantization.lowrank import add_low_rank

# Elements of a factor that are held at a time, so that memory is bounded whatever the rank.
_FACTOR_ELEMENTS = 1 << 18
_LEAST = 32


@dataclass(frozen=True)
class Update:
    """``scale * left @ right``, added to a weight [..., N, M].

    Attributes:
        left: [..., N, r].
        right: [..., r, m]; m is M, or less where the update is of some columns.
        scale: Of the product.
        batch: The matrix of the weight that it is for; None: each has its own factors.
        first: The first of the m columns.
    """

    left: LazyTensor
    right: LazyTensor
    scale: float
    batch: int | None = None
    first: int = 0

    def add_to(self, total: np.ndarray, batch: int, rows: slice, cols: slice) -> None:
        """Add its part of ``weight[batch][rows, cols]`` to ``total``, float32."""
        start, stop = max(cols.start, self.first), min(cols.stop, self.first + self.right.matrix[2])
        if start >= stop or (self.batch is not None and batch != self.batch):
            return
        own = batch if self.batch is None else 0
        ranks = slice(0, self.left.matrix[2])
        step = max(_LEAST, _FACTOR_ELEMENTS // max(1, ranks.stop))
        for some_cols in _steps(start, stop, step):
            inner = slice(some_cols.start - self.first, some_cols.stop - self.first)
            right = _factor(self.right, own, ranks, inner)
            for some_rows in _steps(rows.start, rows.stop, step):
                part = total[_from(some_rows, rows), _from(some_cols, cols)]
                add_low_rank(part, _factor(self.left, own, some_rows, ranks), right, self.scale)


class Merged(Derived):
    """A weight with updates added; in the base's dtype, or in float32 where that is not a plain one.

    Args:
        base: BF16, F16 or FLOAT [..., N, M].
        updates: In their order.
    """

    def __init__(self, base: LazyTensor, updates: Sequence[Update]) -> None:
        factors = [factor for update in updates for factor in (update.left, update.right)]
        super().__init__([base, *factors], base.dtype, base.dims, base.matrix)
        self.base, self.updates = base, tuple(updates)

    @property
    def member(self) -> tuple[int, ...]:
        return self.base.member

    @property
    def by_columns(self) -> bool:
        return self.base.by_columns

    @property
    def origin(self) -> str:
        return self.base.origin

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        tile = self.base.tile(batch, rows, cols)
        updates = [update for update in self.updates if update.batch is None or update.batch == batch]
        if not updates:
            return tile
        total = np.array(tile, np.float32, order="C")
        for update in updates:
            update.add_to(total, batch, rows, cols)
        return total.astype(self.dtype.numpy(), copy=False)

    def alike(self, base: LazyTensor, factor: Callable[[LazyTensor], LazyTensor]) -> Merged:
        """Another weight with as much to merge: ``factor`` makes a stand-in for a factor."""
        updates = [replace(update, left=factor(update.left), right=factor(update.right)) for update in self.updates]
        return Merged(base, updates)


def is_merged(tensor: object) -> bool:
    """Whether a tensor is computed from one with updates added."""
    return isinstance(tensor, Merged) or (isinstance(tensor, Derived) and any(map(is_merged, tensor.parts)))


class Split(Derived):
    """[n r, m] as n matrices [r, m], rows in turn."""

    def __init__(self, part: LazyTensor, count: int) -> None:
        rows, cols = part.dims
        super().__init__([part], part.dtype, [count, rows // count, cols])

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        begin = batch * self.matrix[1]
        return self.parts[0].tile(0, slice(begin + rows.start, begin + rows.stop), cols)


class EveryNth(Derived):
    """[m, r n] as n matrices [m, r]: matrix e has every n-th column from column e on."""

    def __init__(self, part: LazyTensor, count: int) -> None:
        rows, cols = part.dims
        super().__init__([part], part.dtype, [count, rows, cols // count])

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        count = self.matrix[0]
        return self.parts[0].tile(0, rows, slice(cols.start * count, cols.stop * count))[:, batch::count]


class Columns(Derived):
    """Some columns of a matrix [N, M]."""

    def __init__(self, part: LazyTensor, columns: slice) -> None:
        super().__init__([part], part.dtype, [part.dims[0], columns.stop - columns.start])
        self._first = columns.start

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(batch, rows, slice(self._first + cols.start, self._first + cols.stop))


def _steps(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


def _from(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def _factor(factor: LazyTensor, batch: int, rows: slice, cols: slice) -> np.ndarray:
    """A tile of a factor, float64, C order.

    Raises:
        InputError: It is not finite; names the adapter's tensor.
    """
    tile = np.ascontiguousarray(factor.tile(batch, rows, cols), np.float64)
    if broken := count_broken(tile):
        raise InputError(
            f"{factor.origin} has {broken} NaN or infinite values among {tile.size} that were read of it",
            "the adapter is damaged or was trained into overflow; take an earlier one",
        )
    return tile
