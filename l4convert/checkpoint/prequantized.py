"""Weights that a checkpoint stores quantized: dequantized exactly on demand, or carried over as they are.

A checkpoint's low-bit codes need not be rounded a second time where an artifact stores codes of the same kind:
:func:`carried` finds them, and their scales, under whatever was stacked, joined or transposed on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import Cast, Member, OnTop, Reshaped, SideBySide, Stacked, Transposed
from l4convert.checkpoint.finite import count_broken
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.errors import InputError

#: Types of codes that an artifact can store.
CARRIED_TYPES = (ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)


class Prequantized(Derived):
    """A weight [..., N, K] as ``(values - zero_points) * scales``, in float32.

    4-bit and E4M3 values times BF16 or FP16 scales are exact in float32; with float32 scales the product is rounded
    once.

    Args:
        values: Codes of any numeric type [..., N, K].
        scales: BF16, F16 or FLOAT [..., N, ceil(K / block_size)].
        block_size: Elements along K that share a scale; K: one scale a row.
        zero_points: Codes [..., N, ceil(K / block_size)] that stand for 0; None: 0 does.
        groups: Integers [K]: which column of ``scales`` each column of ``values`` has, where that is not
            ``k // block_size`` (activation order).
        activations: The checkpoint means the inputs of the product to be rounded to FP8, too, token by token.
    """

    def __init__(
        self,
        values: LazyTensor,
        scales: LazyTensor,
        block_size: int,
        zero_points: LazyTensor | None = None,
        groups: LazyTensor | None = None,
        activations: bool = False,
    ) -> None:
        blocks = -(-values.dims[-1] // block_size)
        if scales.dims != (*values.dims[:-1], blocks):
            raise ValueError(f"scales {scales.dims} do not fit values {values.dims} in blocks of {block_size}")
        given = {"values": values, "scales": scales, "zero_points": zero_points, "groups": groups}
        self._places = tuple(name for name, part in given.items() if part is not None)
        super().__init__([part for part in given.values() if part is not None], ir.DataType.FLOAT, values.dims)
        self.block_size, self.activations = block_size, activations

    @property
    def values(self) -> LazyTensor:
        """The codes."""
        return self.parts[0]

    @property
    def scales(self) -> LazyTensor:
        """Their scales."""
        return self.parts[1]

    @property
    def zero_points(self) -> LazyTensor | None:
        """The codes that stand for 0."""
        return self._part("zero_points")

    @property
    def groups(self) -> LazyTensor | None:
        """Which scale each column has."""
        return self._part("groups")

    def _part(self, name: str) -> LazyTensor | None:
        return dict(zip(self._places, self.parts, strict=True)).get(name)

    @property
    def origin(self) -> str:
        return self.values.origin

    @property
    def kind(self) -> str:
        """How it is stored, in a few words: "INT4 in groups of 128"."""
        whole = self.block_size >= self.dims[-1]
        by = "with one scale a row" if whole else f"in groups of {self.block_size}"
        words = [type_name(self.values.dtype), by]
        if self.groups is not None:
            words.append("in activation order")
        if self.zero_points is not None:
            words.append("with zero points" if not whole else "and zero points")
        return " ".join(words)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        columns, blocks = self._columns(cols)
        product = self.values.tile(batch, rows, cols).astype(np.float32)
        zero_points = self.zero_points
        if zero_points is not None:
            product -= zero_points.tile(batch, rows, blocks).astype(np.float32)[:, columns]
        scales = self.scales.tile(batch, rows, blocks).astype(np.float32)
        if broken := count_broken(scales):
            raise InputError(
                f"{self.scales.origin} has {broken} NaN or infinite values in rows {rows.start} to {rows.stop - 1},"
                f" scales of tensor {next(iter(self.values.sources), '')!r}",
                "the checkpoint is damaged: compare its files' digests with the publisher's",
            )
        with np.errstate(over="ignore"):  # what is infinite then is refused where it is used
            product *= scales[:, columns]
        return product

    def _columns(self, cols: slice) -> tuple[np.ndarray, slice]:
        """Where the scales of these columns are, in the block of scales that is to be read."""
        groups = self.groups
        if groups is None:
            blocks = slice(cols.start // self.block_size, -(-cols.stop // self.block_size))
            return np.arange(cols.start, cols.stop) // self.block_size - blocks.start, blocks
        columns, count = groups.tile(0, slice(0, 1), cols)[0], self.scales.matrix[2]
        if columns.size and not 0 <= columns.min() <= columns.max() < count:
            raise InputError(f"{groups.origin} names groups beyond the {count} that have scales")
        return columns, slice(0, count)


@dataclass(frozen=True)
class Carried:
    """Codes and scales of a weight that can be stored as they are.

    Attributes:
        values: INT4 or FLOAT8E4M3FN [..., N, K].
        scales: BF16, F16 or FLOAT [..., N, ceil(K / block_size)].
        block_size: Elements along K that share a scale; K: one scale a row.
        activations: Whether inputs are meant to be rounded to FP8, too.
    """

    values: LazyTensor
    scales: LazyTensor
    block_size: int
    activations: bool = False


def carried(tensor: LazyTensor) -> Carried | None:
    """The codes behind a weight [..., N, K], K last; None where it has none, or its parts disagree.

    Sees through stacking, joining, transposing, reshaping of leading axes, and casts.
    """
    return _carried(tensor, k_last=True)


def quantized_parts(tensor: LazyTensor) -> Iterator[Prequantized]:
    """Every weight stored quantized that a tensor is computed from."""
    if isinstance(tensor, Prequantized):
        yield tensor
    elif isinstance(tensor, Derived):
        for part in tensor.parts:
            yield from quantized_parts(part)


def stored_bytes(tensor: LazyTensor) -> int:
    """What a weight takes in the checkpoint: of one that is stored quantized, its codes and scales."""
    if isinstance(tensor, Derived) and next(quantized_parts(tensor), None) is not None:
        return sum(stored_bytes(part) for part in tensor.parts)
    return tensor.nbytes


def type_name(dtype: ir.DataType) -> str:
    """A type of codes as papers write it."""
    return {ir.DataType.FLOAT8E4M3FN: "FP8 E4M3", ir.DataType.FLOAT4E2M1: "FP4 E2M1"}.get(dtype, dtype.name)


def _carried(tensor: LazyTensor, k_last: bool) -> Carried | None:
    """``k_last``: the tensor is [..., N, K]; else [..., K, N]. What is returned is [..., N, K] in both cases."""
    if isinstance(tensor, Prequantized):
        plain = tensor.zero_points is None and tensor.groups is None and tensor.values.dtype in CARRIED_TYPES
        own = Carried(tensor.values, tensor.scales, tensor.block_size, tensor.activations)
        return own if plain and k_last else None
    if isinstance(tensor, Transposed):
        return _carried(tensor.parts[0], not k_last)
    if isinstance(tensor, Cast):
        return _carried(tensor.parts[0], k_last)
    if not isinstance(tensor, Member | Reshaped | Stacked | SideBySide | OnTop):
        return None
    parts = [_carried(part, k_last) for part in tensor.parts]
    found = [part for part in parts if part is not None]
    if (
        len(found) < len(parts)
        or len({(p.values.dtype, p.scales.dtype, p.block_size, p.activations) for p in found}) > 1
    ):
        return None
    return _rebuilt(tensor, found, k_last)


def _rebuilt(tensor: LazyTensor, parts: Sequence[Carried], k_last: bool) -> Carried | None:
    """The same combination of the parts' codes, and of their scales, as ``tensor`` is of the parts."""
    if isinstance(tensor, Member):
        index = tensor.index
        return _both(parts, lambda t: Member(t[0], index))
    if isinstance(tensor, Stacked):
        return _both(parts, Stacked)
    if isinstance(tensor, Reshaped):
        old, new = tensor.parts[0].dims, tensor.dims
        leading = new[:-2]
        return _both(parts, lambda t: Reshaped(t[0], [*leading, *t[0].dims[-2:]])) if old[-2:] == new[-2:] else None
    if isinstance(tensor, SideBySide) != k_last:  # joined along N
        return _both(parts, OnTop)
    whole = all(part.values.dims[-1] % part.block_size == 0 for part in parts)  # else a block goes on in the next part
    return _both(parts, SideBySide) if whole else None


def _both(parts: Sequence[Carried], combine: Callable[[Sequence[LazyTensor]], LazyTensor]) -> Carried:
    values, scales = combine([p.values for p in parts]), combine([p.scales for p in parts])
    return Carried(values, scales, parts[0].block_size, parts[0].activations)
