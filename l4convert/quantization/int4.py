"""INT4 weights: symmetric, a float32 scale for every block of consecutive K, values in [-8, 7] (ONNX's blocked form).

The arithmetic is defined by :func:`int4_blocks`: float32 elementwise operations, and sums that are exact or of a fixed
order, so that every machine and any number of threads give the same bytes. :mod:`.native` computes the same bytes
faster. The rest serves it tile by tile.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import TILE_ELEMENTS, Derived, LazyTensor, pack_rows
from l4convert.quantization import native
from l4convert.quantization.source import require_finite

BLOCK_SIZES = (32, 64, 128)
SCALE_RULES = ("absmax", "lse")

_LOW, _HIGH = -8.0, 7.0

# A block whose largest magnitude is below this is stored as zeros: its scale could be subnormal, which kernels flush.
_NEGLIGIBLE = np.float32(2.0**-100)

# "lse" tries -extreme/divisor as a block's scale, for these divisors in quarters, in this order (a tie goes to the
# first). The sign puts the extreme element at -8, the end of the grid that the positive side lacks. Larger blocks have
# elements farther out, which are better clipped. docs/adr/0010-quantization-kernels.md says what these choices cost.
_QUARTERS = {32: range(26, 37), 64: range(28, 39), 128: range(28, 41)}

# While a scale is searched, blocks are divided by their extreme element and rounded to multiples of 1/8192.
_UNIT = np.float32(8192)

# Keeps sums of large weights finite.
_SMALLER = np.float32(2.0**-12)

# Elements per call of the arithmetic: a handful of float32 arrays of this size stay in a core's cache.
_CHUNK = 1 << 16


def quantize_int4(weight: LazyTensor, block_size: int, scale: str) -> tuple[LazyTensor, LazyTensor]:
    """Quantize the rows of a weight in blocks along its last axis.

    Ask for the values and then the scales of the same tile (columns ``block_size`` times fewer) in one thread, and the
    arithmetic runs once for both.

    Args:
        weight: [..., N, K], BF16, FP16 or FP32.
        block_size: One of :data:`BLOCK_SIZES`. K need not be a multiple: the last block is then shorter.
        scale: One of :data:`SCALE_RULES`; see :func:`int4_blocks`.

    Returns:
        Values INT4 [..., N, K] and scales FLOAT [..., N, ceil(K / block_size)]. Their product approximates ``weight``
        (ONNX ``DequantizeLinear`` with ``axis=-1`` and this ``block_size``). A tile of either raises
        :class:`~l4convert.errors.InputError` where the weight is NaN or infinite.
    """
    if block_size not in BLOCK_SIZES or scale not in SCALE_RULES:
        raise ValueError(f"unknown INT4 scheme: block size {block_size}, scale {scale!r}")
    quantizer = _Quantizer(weight, block_size, scale)
    return _Values(quantizer), _Scales(quantizer)


def int4_blocks(weight: np.ndarray, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantize blocks; ``values * scales`` approximates ``weight``.

    "absmax": s = max|w| / 7. "lse": the q of least squared error sum (w - s q)^2 among the nearest values of the grid
    for s = -4 extreme / :data:`_QUARTERS`, each with its own best s = sum w q / sum q^2.

    Args:
        weight: float32 [R, nb, bs], finite; bs one of :data:`BLOCK_SIZES`.
        scale: One of :data:`SCALE_RULES`.

    Returns:
        Values int8 [R, nb, bs] in [-8, 7] and scales float32 [R, nb]; a zero block has values 0 and scale 1.
    """
    rows, blocks, size = weight.shape
    # One block a column: a sum over a block then adds whole rows, in an order that depends on no SIMD width.
    columns = np.array(weight.transpose(2, 0, 1), order="C").reshape(size, rows * blocks)
    high, low = columns.max(axis=0), columns.min(axis=0)
    extreme = np.where(high >= -low, high, low)
    dead = np.abs(extreme) < _NEGLIGIBLE
    if dead.any():
        extreme[dead], columns[:, dead] = 1, 1  # anything that divides well
    values, scales = (_absmax if scale == "absmax" else _least_error)(columns, extreme)
    values[:, dead], scales[dead] = 0, 1
    return values.astype(np.int8).T.reshape(rows, blocks, size), scales.reshape(rows, blocks)


def _absmax(columns: np.ndarray, extreme: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(extreme) / np.float32(7)
    return np.rint(columns / scales), scales


def _least_error(columns: np.ndarray, extreme: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales by the search of :func:`int4_blocks`, for blocks [bs, M] and their extremes [M].

    Sums of the search are exact in any order: the elements of ``unit`` are n/8192 with whole |n| <= 8192 and divisors
    have two binary places, so products have at most 19 bits and sums over a block 24, and float32 rounds none of them.
    """
    unit = np.rint(columns * (-_UNIT / extreme)) / _UNIT
    best_square, best_energy = np.full_like(extreme, -1), np.ones_like(extreme)
    best_divisor = np.zeros_like(extreme)
    for quarters in _QUARTERS[len(columns)]:
        divisor = np.float32(quarters / 4)
        values = _nearest(unit, divisor)
        projection, energy = np.einsum("km,km->m", values, unit), np.einsum("km,km->m", values, values)
        square = projection * projection
        # the error at the best scale is a constant less square / energy
        better = square * best_energy > best_square * energy
        for best, found in ((best_square, square), (best_energy, energy), (best_divisor, divisor)):
            np.copyto(best, found, where=better)
    values = _nearest(unit, best_divisor)
    return values, _best_scales(columns, values, best_energy)


def _nearest(unit: np.ndarray, divisor: np.ndarray | np.float32) -> np.ndarray:
    """The nearest values of the grid for scale ``1 / divisor``, ties up."""
    values: np.ndarray = np.clip(np.floor(unit * divisor + np.float32(0.5)), _LOW, _HIGH)
    return values


def _best_scales(columns: np.ndarray, values: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """``sum w q / sum q^2`` of blocks [bs, M], given ``sum q^2``; exact where the weights are on a grid of BF16 scales.

    Sums even and odd elements in order of k.
    """
    terms = columns * _SMALLER * values
    pair = terms[:2]
    for k in range(2, len(terms), 2):
        pair += terms[k : k + 2]
    scales: np.ndarray = (pair[0] + pair[1]) / (energy * _SMALLER)
    return scales


@dataclass(frozen=True, eq=False)
class _Quantizer:
    """What the values and the scales of one weight share."""

    weight: LazyTensor
    block_size: int
    scale: str

    def tile(self, batch: int, rows: slice, blocks: slice, form: _Form | None = None) -> _Result:
        """Values, in any form where none is asked for, and scales float32 [rows, blocks]."""
        key = (self, batch, rows.start, rows.stop, blocks.start, blocks.stop)
        recent: deque[_Entry] = _memo.__dict__.setdefault("recent", deque(maxlen=_RECENT))
        for known, known_form, result in recent:
            if known == key and form in (known_form, None):
                return result
        form = form or "packed"
        result = self._compute(batch, rows, blocks, form)
        recent.append((key, form, result))
        return result

    def _compute(self, batch: int, rows: slice, blocks: slice, form: _Form) -> _Result:
        columns = slice(blocks.start * self.block_size, min(blocks.stop * self.block_size, self.weight.matrix[2]))
        weight = self.weight.tile(batch, rows, columns)
        if native.AVAILABLE:
            result = native.int4(weight, self.block_size, self.scale, form == "packed")
            if result is not None:
                return result
        require_finite(weight, self.weight, batch, rows)
        values, scales = quantize_rows(weight, self.block_size, self.scale)
        return (pack_rows(values) if form == "packed" else values.view(np.uint8) & np.uint8(0x0F)), scales


def quantize_rows(weight: np.ndarray, block_size: int, scale: str) -> _Result:
    """:func:`int4_blocks` of the rows of a matrix.

    Args:
        weight: [R, K], BF16, FP16 or FP32, finite. A short last block is filled up with zeros.
        block_size: One of :data:`BLOCK_SIZES`.
        scale: One of :data:`SCALE_RULES`.

    Returns:
        Values int8 [R, nb * block_size] and scales float32 [R, nb].
    """
    rows, cols = weight.shape
    blocks = -(-cols // block_size)
    values, scales = np.empty((rows, blocks, block_size), np.int8), np.empty((rows, blocks), np.float32)
    step = max(1, _CHUNK // max(1, blocks * block_size))
    for start in range(0, rows, step):
        part = weight[start : start + step].astype(np.float32)
        part = np.pad(part, ((0, 0), (0, blocks * block_size - cols))).reshape(-1, blocks, block_size)
        values[start : start + step], scales[start : start + step] = int4_blocks(part, scale)
    return values.reshape(rows, -1), scales


# The values of a tile, uint8: "packed" two to a byte [rows, blocks * block_size / 2], the last block filled up with
# zeros; "bytes" one to a byte [rows, at least the tile's columns], the upper nibble clear.
_Form = Literal["packed", "bytes"]
_Result = tuple[np.ndarray, np.ndarray]
_Entry = tuple[tuple[object, ...], _Form, _Result]

# The last tiles computed in this thread, for all tensors, so that finished ones hold no memory. Two: gate and up rows
# that are interleaved after quantization are asked for in turn, first their values and then their scales.
_RECENT = 2
_memo = threading.local()


class _Values(Derived):
    def __init__(self, quantizer: _Quantizer) -> None:
        weight = quantizer.weight
        super().__init__([weight], ir.DataType.INT4, weight.dims, weight.matrix)
        self._quantizer = quantizer

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        values, first = self._blocks(batch, rows, cols, "bytes")
        return values[:, cols.start - first : cols.stop - first].view(ml_dtypes.int4)

    def packed(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        values, first = self._blocks(batch, rows, cols, "packed")
        return values[:, (cols.start - first) // 2 : (cols.stop - first + 1) // 2]

    def _blocks(self, batch: int, rows: slice, cols: slice, form: _Form) -> tuple[np.ndarray, int]:
        """The values of the whole blocks that hold these columns, and their first column."""
        size = self._quantizer.block_size
        blocks = slice(cols.start // size, -(-cols.stop // size))
        return self._quantizer.tile(batch, rows, blocks, form)[0], blocks.start * size


class _Scales(Derived):
    def __init__(self, quantizer: _Quantizer) -> None:
        weight = quantizer.weight
        batch, rows, cols = weight.matrix
        blocks = -(-cols // quantizer.block_size)
        super().__init__([weight], ir.DataType.FLOAT, [*weight.dims[:-1], blocks], (batch, rows, blocks))
        self._quantizer = quantizer

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        """As :meth:`LazyTensor.tile`; reads and quantizes about ``TILE_ELEMENTS`` elements of the weight at a time."""
        step = max(1, TILE_ELEMENTS // max(1, (cols.stop - cols.start) * self._quantizer.block_size))
        if rows.stop - rows.start <= step:
            return self._quantizer.tile(batch, rows, cols)[1]
        starts = range(rows.start, rows.stop, step)
        parts = [self._quantizer.tile(batch, slice(r, min(r + step, rows.stop)), cols)[1] for r in starts]
        return np.concatenate(parts)
