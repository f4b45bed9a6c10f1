"""Weights stored as floating-point codes of 8 or 4 bits with scales: what the readers of all methods share.

E4M3 is ONNX's FLOAT8E4M3FN, E2M1 its FLOAT4E2M1 (OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats
1.0, section 5.3). Both methods that store E2M1 put the earlier of two codes into a byte's low half
(compressed_tensors/compressors/nvfp4/helpers.py, modelopt/torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.finite import count_broken
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.prequantized import Prequantized
from l4convert.errors import InputError

#: Elements along K that share an E4M3 scale in NVFP4.
NVFP4_BLOCK = 16

_E8M0_BIAS, _E8M0_NAN = 127, 255
_NAN = 0x7F  # E4M3's only NaN, but for the sign; all codes below are finite
_HINT = "the checkpoint is damaged: compare its files' digests with the publisher's"


class Finite(Derived):
    """E4M3 codes or floating-point scales as they are; a tile that has NaN or an infinity raises InputError."""

    def __init__(self, part: LazyTensor) -> None:
        super().__init__([part], part.dtype, part.dims, part.matrix)

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        tile = self.parts[0].tile(batch, rows, cols)
        broken = _nan_codes(tile) if self.dtype == ir.DataType.FLOAT8E4M3FN else count_broken(tile)
        if broken:
            place = f"rows {rows.start} to {rows.stop - 1} of matrix {batch}" if self.size > 1 else "it"
            raise InputError(f"{self.origin} has {broken} NaN or infinite values in {place}", _HINT)
        return tile


def _nan_codes(tile: np.ndarray) -> int:
    magnitudes = tile.view(np.uint8) & _NAN
    if magnitudes.size == 0 or magnitudes.max() != _NAN:
        return 0
    return int(np.count_nonzero(magnitudes == _NAN))


class Repeated(Derived):
    """Scales of which several rows, or all matrices, share one.

    Args:
        part: Scales of ``ceil(N / each)`` rows, in one matrix for all or in as many as ``dims`` has.
        dims: [..., N, G], G being what ``part`` has.
        each: Rows that share a row of ``part``.
    """

    def __init__(self, part: LazyTensor, dims: Sequence[int], each: int) -> None:
        super().__init__([part], part.dtype, dims)
        self._each = each
        if part.matrix not in ((self.matrix[0], *self._stored()), (1, *self._stored())):
            raise ValueError(f"{part.dims} cannot be repeated to {tuple(dims)}")

    def _stored(self) -> tuple[int, int]:
        return -(-self.matrix[1] // self._each), self.matrix[2]

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        part, each = self.parts[0], self._each
        first = rows.start // each
        stored = part.tile(batch if part.matrix[0] > 1 else 0, slice(first, -(-rows.stop // each)), cols)
        repeated: np.ndarray = stored[np.arange(rows.start, rows.stop) // each - first]
        return repeated


class Upright(Derived):
    """A vector [n] of scales as [n, 1], one a row, or as [n, 1, 1], one a matrix."""

    def __init__(self, part: LazyTensor, dims: Sequence[int]) -> None:
        super().__init__([part], part.dtype, dims)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        before = batch * self.matrix[1]
        return self.parts[0].tile(0, slice(0, 1), slice(before + rows.start, before + rows.stop)).T[:, cols]


class Nested(Derived):
    """NVFP4's scales: E4M3 block scales combined with one float32 scale of the tensor, rounded once to float32.

    Args:
        blocks: FLOAT8E4M3FN [..., N, K / 16].
        whole: One float32.
        combine: What joins them: a product (ModelOpt), or a quotient (compressed-tensors).
    """

    def __init__(
        self, blocks: LazyTensor, whole: LazyTensor, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        super().__init__([blocks, whole], ir.DataType.FLOAT, blocks.dims, blocks.matrix)
        self._combine = combine

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        blocks, whole = self.parts
        scale = whole.tile(0, slice(0, 1), slice(0, 1)).astype(np.float32)
        if not scale.all():
            raise InputError(f"{whole.origin} is 0, which is no scale", _HINT)
        return self._combine(blocks.tile(batch, rows, cols).astype(np.float32), scale)


class PowersOfTwo(Derived):
    """MX scales: E8M0 bytes ``e`` as ``2 ** (e - 127)`` in float32, which is exact; 255 is NaN (Microscaling Formats
    1.0, section 5.4.1) and refused."""

    def __init__(self, exponents: LazyTensor) -> None:
        super().__init__([exponents], ir.DataType.FLOAT, exponents.dims, exponents.matrix)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        stored = self.parts[0].tile(batch, rows, cols)
        if broken := int(np.count_nonzero(stored == _E8M0_NAN)):
            raise InputError(f"{self.origin} has {broken} NaN values", _HINT)
        return np.ldexp(np.float32(1), stored.astype(np.int32) - _E8M0_BIAS)


class UnpackedE2M1(Derived):
    """Bytes [..., N, K / 2] as the E2M1 codes [..., N, K], one element each in memory."""

    def __init__(self, packed: LazyTensor) -> None:
        *lead, rows, width = packed.dims
        super().__init__([packed], ir.DataType.FLOAT4E2M1, [*lead, rows, 2 * width])

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        first = cols.start // 2
        stored = self.parts[0].tile(batch, rows, slice(first, -(-cols.stop // 2)))
        codes = np.stack([stored & 0x0F, stored >> 4], axis=-1).reshape(len(stored), -1)
        begin = cols.start - 2 * first
        return codes[:, begin : begin + cols.stop - cols.start].view(ml_dtypes.float4_e2m1fn)


def row_scales(scales: LazyTensor, dims: Sequence[int]) -> LazyTensor:
    """Scales as [..., N, 1], one a row.

    Args:
        scales: One for all: [], [1] or [1, 1]; one a matrix: [E] where there are several; one a row: [N] where there is
            one matrix, or [..., N, 1].
        dims: Of the codes, [..., N, K].
    """
    *lead, rows, _ = dims
    target = [*lead, rows, 1]
    if scales.dims == (rows,) and not lead:
        return Upright(scales, target)
    if scales.dims == tuple(lead) and lead:
        return Repeated(Upright(scales, [*lead, 1, 1]), target, rows)
    return Repeated(scales, target, rows) if scales.matrix == (1, 1, 1) else scales


def e4m3_weight(codes: LazyTensor, scales: LazyTensor, activations: bool = False) -> Prequantized:
    """A weight [..., N, K] of E4M3 codes.

    Args:
        codes: FLOAT8E4M3FN [..., N, K].
        scales: As :func:`row_scales` takes them.
        activations: The checkpoint means inputs to be rounded to FP8, too, token by token.

    Raises:
        ValueError: The shapes do not fit.
    """
    scales = row_scales(Finite(scales), codes.dims)
    return Prequantized(Finite(codes), scales, codes.dims[-1], activations=activations)


def nvfp4_weight(packed: LazyTensor, scales: LazyTensor) -> Prequantized:
    """A weight [..., N, K] of E2M1 codes packed to bytes [..., N, K / 2], with scales [..., N, K / 16]."""
    return Prequantized(UnpackedE2M1(packed), scales, NVFP4_BLOCK)
