"""Cut a planned weights file into jobs: blocks of rows of a group of tensors, each with fixed places in the file.

A job depends on the plan alone, never on how many run at once, so any run, also one on another day, computes the same
jobs under the same numbers. Jobs are made on demand: a model of 2 T parameters has half a million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from l4convert.checkpoint.lazy import TILE_ELEMENTS, Derived, LazyTensor, array_bytes
from l4convert.emit.plan import PlannedTensor, WeightsPlan, goes_by_columns

# An upper bound of what computing a block holds at its peak, per element of the weights that it is computed from (two
# copies in BF16, float32 where a whole block is converted, values before and after packing, and the bytes of the
# result). tests/planning/test_memory.py compares it with what tracemalloc counts.
_BYTES_AN_ELEMENT = 16
_LEAST_BYTES = 1 << 20
# Rows that are columns of the source (a transposed lm_head is 202,048 wide) touch a cache line, 32 BF16 elements, each.
_LEAST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes that one job writes of one tensor: of the rows, or columns, of a matrix from ``start`` to ``stop``."""

    planned: PlannedTensor
    batch: int
    start: int
    stop: int
    whole: bool
    by_columns: bool = False

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.places)

    @property
    def offset(self) -> int:
        """Of its first byte in the file."""
        return next(self.places)[0]

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """Where its bytes go, in their order: offset in the file, and how many."""
        begin = self.planned.offset
        if self.by_columns:
            tensor = _lazy(self.planned)
            first, last = (column * tensor.dtype.bitwidth // 8 for column in (self.start, self.stop))
            for row in range(tensor.matrix[1]):
                yield begin + self._position(row) + first, last - first
        elif self.whole:
            yield begin, self.planned.nbytes
        else:
            yield begin + self._position(self.start), self._position(self.stop) - self._position(self.start)

    @property
    def complete(self) -> int:
        """Up to where the tensor's bytes are all in the file once this job, and all before it, are done."""
        if not self.by_columns:
            return self.offset + self.nbytes
        _, rows, cols = _lazy(self.planned).matrix
        return self.planned.offset + self._position(rows if self.stop == cols else 0)

    def compute(self) -> bytes | memoryview:
        """Its bytes, as stored."""
        tensor = self.planned.tensor
        if self.whole or not isinstance(tensor, LazyTensor):
            return tensor.tobytes()
        some, every = slice(self.start, self.stop), slice(0, tensor.matrix[1 if self.by_columns else 2])
        part = (self.batch, *((every, some) if self.by_columns else (some, every)))
        if tensor.dtype.bitwidth < 8 and tensor.matrix[2] % 2 == 0:  # no two rows share a byte
            return tensor.packed(*part).tobytes()
        return array_bytes(tensor.tile(*part), tensor.dtype)

    def _position(self, row: int) -> int:
        """Bytes of the tensor before a row; an odd 4-bit tensor's last byte is half used."""
        tensor = self.planned.tensor
        if self.whole or not isinstance(tensor, LazyTensor):
            return 0
        _, rows, cols = tensor.matrix
        bits = (self.batch * rows + row) * cols * tensor.dtype.bitwidth
        return -(-bits // 8)


@dataclass(frozen=True, slots=True)
class Job:
    """A block of rows of a group; ``index`` counts through the whole plan.

    Attributes:
        memory: About how many bytes computing it takes at its peak.
    """

    index: int
    pieces: tuple[Piece, ...]
    memory: int

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def plan_jobs(plan: WeightsPlan, first: int = 0, stop: int | None = None) -> Iterator[Job]:
    """The jobs from ``first`` to before ``stop``, by default all, in the order of the file."""
    index = 0
    for group in plan.groups:
        if stop is not None and index >= stop:
            return
        count = count_jobs(group)
        if index + count > first:
            end = None if stop is None else stop - index
            yield from islice(group_jobs(group, index), max(0, first - index), end)
        index += count


def total_jobs(plan: WeightsPlan) -> int:
    """How many jobs a plan has."""
    return sum(map(count_jobs, plan.groups))


def largest_job(plan: WeightsPlan) -> int:
    """The most memory that a job takes, in bytes; the first one of a group is never smaller than the others."""
    return max((next(group_jobs(group, 0)).memory for group in plan.groups), default=0)


def group_jobs(group: Sequence[PlannedTensor], first: int) -> Iterator[Job]:
    """The jobs of a group, numbered from ``first``.

    The tensors of a group advance in step, so that what they are computed from is read once: by the same rows, or where
    one has a row for several of another (scales of blocks), by as many times fewer; or by columns.
    """
    step = _rows_a_job(group)
    if step is None:
        memory = sum(max(planned.nbytes * 8, _elements(planned) * 4) for planned in group)
        yield Job(first, tuple(Piece(planned, 0, 0, 0, True) for planned in group), memory + _LEAST_BYTES)
        return
    batch, rows, times = _heights(group)
    memory = min(step, rows) * _group_width(group, times) * _BYTES_AN_ELEMENT + _LEAST_BYTES
    for b in range(batch):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            pieces = tuple(
                Piece(planned, b, start // n, stop // n, False) if n else Piece(planned, b, start, stop, False, True)
                for planned, n in zip(group, times, strict=True)
            )
            yield Job(first, pieces, memory)
            first += 1


def count_jobs(group: Sequence[PlannedTensor]) -> int:
    """How many jobs a group has."""
    step = _rows_a_job(group)
    if step is None:
        return 1
    batch, rows, _ = _heights(group)
    return batch * -(-rows // step)


def _rows_a_job(group: Sequence[PlannedTensor]) -> int | None:
    """Rows in a job; None where the group cannot be cut, because it is in memory or matrices share bytes."""
    if not all(isinstance(planned.tensor, LazyTensor) for planned in group):
        return None
    batch, _, times = _heights(group)
    rows = max(_LEAST_ROWS, TILE_ELEMENTS // _group_width(group, times))
    block = max(times)
    rows = max(block, rows // block * block)
    for planned, n in zip(group, times, strict=True):
        tensor = _lazy(planned)
        if tensor.dtype.bitwidth < 8 and tensor.matrix[2] % 2:  # two rows share a byte
            if n > 1 or (batch > 1 and tensor.matrix[1] % 2):
                return None
            rows += block * (rows % 2)
    return rows


def _heights(group: Sequence[PlannedTensor]) -> tuple[int, int, list[int]]:
    """Matrices, rows of the tallest, and how many of those go with one row of each tensor; 0: one with a column."""
    tensors = [_lazy(planned) for planned in group]
    highest = max(tensors, key=lambda tensor: tensor.matrix[1])
    batch, tallest, _ = highest.matrix
    times = [0 if goes_by_columns(t, highest) else tallest // max(1, t.matrix[1]) for t in tensors]
    return batch, tallest, times


def _group_width(group: Sequence[PlannedTensor], times: Sequence[int]) -> int:
    """The longest row that computing a row of the group passes through."""
    return max(_width(planned.tensor) for planned, n in zip(group, times, strict=True) if n)


def _width(tensor: ir.TensorProtocol) -> int:
    """The longest row that computing a row of the tensor passes through: what is packed was twice as long before."""
    if not isinstance(tensor, LazyTensor):
        return 1
    parts = tensor.parts if isinstance(tensor, Derived) else ()
    same_rows = [_width(part) for part in parts if part.matrix[:2] == tensor.matrix[:2]]
    return max(tensor.matrix[2], *same_rows, 1)


def _elements(planned: PlannedTensor) -> int:
    return planned.tensor.size if isinstance(planned.tensor, LazyTensor) else 0


def _lazy(planned: PlannedTensor) -> LazyTensor:
    assert isinstance(planned.tensor, LazyTensor)
    return planned.tensor
