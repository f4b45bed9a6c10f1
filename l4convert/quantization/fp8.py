"""FP8 E4M3 weights: one float32 scale for every output channel.

E4M3 is ONNX's FLOAT8E4M3FN (Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433): 4 exponent and 3
mantissa bits, largest finite value 448, no infinities.
"""

from __future__ import annotations

import threading
from collections import deque

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import TILE_ELEMENTS, Derived, LazyTensor
from l4convert.quantization import native
from l4convert.quantization.source import require_finite

E4M3_MAX = 448.0

# Rows whose largest magnitude is below this are stored as zeros: their scale could be subnormal, which kernels flush.
_NEGLIGIBLE = np.float32(2.0**-100)


def quantize_fp8(weight: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    """Quantize every row of a weight by its largest magnitude: s = max|w| / 448, q = w / s to nearest even.

    Args:
        weight: [..., N, K], BF16, FP16 or FP32.

    Returns:
        Values FLOAT8E4M3FN [..., N, K], always finite, and scales FLOAT [..., N, 1] (1 for a row of zeros). Their
        product approximates ``weight``. A tile of either raises :class:`~l4convert.errors.InputError` where the weight
        is NaN or infinite.
    """
    quantizer = _Quantizer(weight)
    return _Values(quantizer), _Scales(quantizer)


def row_scales(magnitude: np.ndarray) -> np.ndarray:
    """Scales of rows with the given largest magnitudes; float32 to float32, any shape."""
    scales = magnitude / np.float32(E4M3_MAX)
    return np.where(magnitude < _NEGLIGIBLE, np.float32(1), scales)


def to_e4m3(scaled: np.ndarray) -> np.ndarray:
    """Round float32 to FLOAT8E4M3FN, ties to even, beyond the largest value to the largest value."""
    values: np.ndarray = np.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
    return values


class _Quantizer:
    """What the values and the scales of one weight share: the scales of the rows that were last asked for.

    Blocks of rows are remembered by thread, since each thread asks for the values and then the scales of its own. All
    rows of a matrix, which blocks of columns have in common, are remembered for every thread.
    """

    def __init__(self, weight: LazyTensor) -> None:
        self.weight = weight
        self._whole: deque[_Entry] = deque(maxlen=1)
        self._computing = threading.Lock()

    def __reduce__(self) -> tuple[type[_Quantizer], tuple[LazyTensor]]:
        """Plans travel to other machines; what is remembered stays here."""
        return _Quantizer, (self.weight,)

    def values(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        weight = self.weight.tile(batch, rows, cols)
        magnitude = _magnitude(weight, self.weight, batch, rows)
        whole = (cols.start, cols.stop) == (0, self.weight.matrix[2])
        scales = self.scales(batch, rows, magnitude if whole else None)
        if native.AVAILABLE:
            return native.fp8(weight, scales[:, 0])
        return to_e4m3(weight.astype(np.float32) / scales)

    def scales(self, batch: int, rows: slice, magnitude: np.ndarray | None = None) -> np.ndarray:
        """float32 [rows, 1]. Whole rows decide, so they are read here unless their largest magnitudes are given."""
        if (rows.start, rows.stop) == (0, self.weight.matrix[1]):
            with self._computing:  # who comes second finds what the first one computed
                return self._remembered(self._whole, batch, rows, magnitude)
        recent: deque[_Entry] = _memo.__dict__.setdefault("recent", deque(maxlen=_RECENT))
        return self._remembered(recent, batch, rows, magnitude)

    def _remembered(self, recent: deque[_Entry], batch: int, rows: slice, magnitude: np.ndarray | None) -> np.ndarray:
        key = (self, batch, rows.start, rows.stop)
        for known, scales in recent:
            if known == key:
                return scales
        scales = row_scales(self._magnitudes(batch, rows) if magnitude is None else magnitude)
        recent.append((key, scales))
        return scales

    def _magnitudes(self, batch: int, rows: slice) -> np.ndarray:
        width = self.weight.matrix[2]
        step = max(1, TILE_ELEMENTS // max(1, rows.stop - rows.start))
        largest = np.zeros((rows.stop - rows.start, 1), np.float32)
        for start in range(0, width, step):
            part = self.weight.tile(batch, rows, slice(start, min(start + step, width)))
            np.maximum(largest, _magnitude(part, self.weight, batch, rows), out=largest)
        return largest


_Entry = tuple[tuple[_Quantizer, int, int, int], np.ndarray]

# The last scales computed in this thread, for all tensors. Two: gate and up rows may be asked for in turn.
_RECENT = 2
_memo = threading.local()


def _magnitude(tile: np.ndarray, weight: LazyTensor, batch: int, rows: slice) -> np.ndarray:
    """Largest magnitude of every row, float32 [R, 1]; raises InputError where the tile is not finite."""
    if native.AVAILABLE:
        magnitude = native.magnitudes(tile)[:, None]
        if not np.isfinite(magnitude).all():
            require_finite(tile, weight, batch, rows)
        return magnitude
    require_finite(tile, weight, batch, rows)
    return np.abs(tile).max(axis=1, keepdims=True, initial=0).astype(np.float32)  # type: ignore[no-any-return]


class _Values(Derived):
    def __init__(self, quantizer: _Quantizer) -> None:
        weight = quantizer.weight
        super().__init__([weight], ir.DataType.FLOAT8E4M3FN, weight.dims, weight.matrix)
        self._quantizer = quantizer

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._quantizer.values(batch, rows, cols)


class _Scales(Derived):
    def __init__(self, quantizer: _Quantizer) -> None:
        weight = quantizer.weight
        batch, rows, _ = weight.matrix
        super().__init__([weight], ir.DataType.FLOAT, [*weight.dims[:-1], 1], (batch, rows, 1))
        self._quantizer = quantizer

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self._quantizer.scales(batch, rows)[:, cols]
