"""The compiled kernels (native.cpp): :mod:`.int4`, :mod:`.fp8` and a layout of codes, at the speed of memory.

They give the bytes of the NumPy definitions, bit for bit; tests compare them. Where no compiler was at hand when the
package was built there is no library, :data:`AVAILABLE` is false, and the definitions themselves are used. Every call
is single-threaded, thread-safe and releases the GIL. docs/adr/0010-quantization-kernels.md says why C++ and ctypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

_INTERFACE = 4

# The highest instruction set to use (x86-64: 0 SSE2, 1 AVX2, 2 AVX-512), where the machine has it.
_LEVEL = 2

_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "l4_interface": [],
    "l4_int4": [_ADDRESS, *4 * [_SIZE], *5 * [_INT], _ADDRESS, _ADDRESS],
    "l4_magnitudes": [_ADDRESS, *3 * [_SIZE], *3 * [_INT], _ADDRESS],
    "l4_reorder": [_ADDRESS, _ADDRESS, _SIZE, _ADDRESS],
    "l4_lowrank": [_ADDRESS, _SIZE, *2 * [_ADDRESS], *3 * [_SIZE], ctypes.c_double, _ADDRESS, _INT],
    "l4_fp8": [_ADDRESS, *3 * [_SIZE], *3 * [_INT], _ADDRESS, _ADDRESS],
}


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("kernels.bin")))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError):  # not built, or built for another platform or from another version of the source
        return None
    return library if library.l4_interface() == _INTERFACE else None


_library = _load()

#: Whether the compiled kernels are there.
AVAILABLE = _library is not None


def int4(weight: np.ndarray, block_size: int, scale: str, packed: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Quantize a matrix in blocks of columns, as :func:`.int4.int4_blocks`.

    Args:
        weight: BF16, FP16 or FP32 [N, K] of any strides; contiguous along either axis it is read in place.
        block_size: 32, 64 or 128. A short last block counts as filled up with zeros.
        scale: "absmax" or "lse".
        packed: Two values a byte, or one.

    Returns:
        Values and scales, or None where the weight is not finite. Values are uint8: packed [N, nb * block_size / 2],
        the earlier value in the low nibble, with the last block filled up; else [N, K], the upper nibble clear,
        contiguous along N. Scales are float32 [N, nb], contiguous along N.
    """
    assert _library is not None
    weight = _readable(weight)
    rows, cols = weight.shape
    blocks = -(-cols // block_size)
    values = np.empty((rows, blocks * block_size // 2) if packed else (cols, rows), np.uint8)
    scales = np.empty((blocks, rows), np.float32)
    status = _library.l4_int4(
        weight.ctypes.data,
        *weight.shape,
        *weight.strides,
        _is_bf16(weight),
        block_size,
        scale == "lse",
        packed,
        _LEVEL,
        values.ctypes.data,
        scales.ctypes.data,
    )
    if status < 0:
        raise ValueError(f"no kernel for block size {block_size}")
    return None if status else (values if packed else values.T, scales.T)


def magnitudes(weight: np.ndarray) -> np.ndarray:
    """Largest magnitude of every row of a BF16, FP16 or FP32 matrix [N, K].

    Returns:
        float32 [N], NaN or infinite where the row is not finite.
    """
    assert _library is not None
    weight = _readable(weight)
    memory, by_column = _as_stored(weight)
    bits = np.empty(len(weight), np.int32)
    _library.l4_magnitudes(
        memory.ctypes.data, *memory.shape, memory.strides[0], _is_bf16(weight), by_column, _LEVEL, bits.ctypes.data
    )
    return bits.view(np.float32)


def fp8(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Divide the rows of a finite matrix by their scales and round, as :func:`.fp8.to_e4m3`.

    Args:
        weight: BF16, FP16 or FP32 [N, K] of any strides.
        scales: float32 [N].

    Returns:
        FLOAT8E4M3FN [N, K] in the weight's memory order.
    """
    assert _library is not None
    weight = _readable(weight)
    memory, by_column = _as_stored(weight)
    scales = np.ascontiguousarray(scales, np.float32)
    values = np.empty(memory.shape, ml_dtypes.float8_e4m3fn)
    _library.l4_fp8(
        memory.ctypes.data,
        *memory.shape,
        memory.strides[0],
        _is_bf16(weight),
        by_column,
        _LEVEL,
        scales.ctypes.data,
        values.ctypes.data,
    )
    return values.T if by_column else values


# Columns that are worked on together, at most (native_lowrank.h, COLUMNS).
_PACKED_COLUMNS = 32


def add_low_rank(total: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> None:
    """Add a scaled product of factors, as :func:`.lowrank.add_low_rank`.

    Args:
        total: float32 [N, M] with contiguous rows; changed in place.
        left: float64 [N, r], C order.
        right: float64 [r, M], C order.
        scale: Of the product.
    """
    assert _library is not None
    (rows, ranks), columns = left.shape, right.shape[1]
    if not all(factor.flags.c_contiguous and factor.dtype == np.float64 for factor in (left, right)):
        raise ValueError("factors must be float64 in C order")
    if total.shape != (rows, columns) or right.shape[0] != ranks or total.dtype != np.float32:
        raise ValueError(f"no product of {left.shape} and {right.shape} in {total.dtype} {total.shape}")
    if columns > 1 and total.strides[1] != total.itemsize:
        raise ValueError("rows must be contiguous")
    packed = np.empty(ranks * _PACKED_COLUMNS)
    _library.l4_lowrank(
        total.ctypes.data,
        total.strides[0] // total.itemsize,
        left.ctypes.data,
        right.ctypes.data,
        *(rows, columns, ranks),
        scale,
        packed.ctypes.data,
        _LEVEL,
    )


#: Codes in the groups that :func:`reorder` takes.
REORDERED = 64


def reorder(packed: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Reorder 4-bit codes inside groups of :data:`REORDERED`, as :func:`.layouts.reorder_nibbles`.

    Args:
        packed: uint8 [R, 32 n].
        order: A permutation of ``range(64)``: slot s takes code ``order[s]``.

    Returns:
        uint8 of the same shape.
    """
    assert _library is not None
    packed, places = np.ascontiguousarray(packed), np.asarray(order, np.uint8)
    if sorted(order) != list(range(REORDERED)) or packed.shape[-1] % (REORDERED // 2):
        raise ValueError(f"{packed.shape}: not whole groups of {REORDERED} codes, or no order of them")
    result = np.empty_like(packed)
    _library.l4_reorder(packed.ctypes.data, result.ctypes.data, packed.size // (REORDERED // 2), places.ctypes.data)
    return result


def _readable(weight: np.ndarray) -> np.ndarray:
    """The same values in a type and memory order that the kernels read."""
    if weight.dtype not in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
        weight = weight.astype(np.float32)
    return weight if weight.itemsize in weight.strides else np.ascontiguousarray(weight)


def _as_stored(weight: np.ndarray) -> tuple[np.ndarray, bool]:
    """The matrix, or its transpose, such that rows are contiguous; whether it is the transpose."""
    by_column = weight.strides[1] != weight.itemsize
    return (weight.T, True) if by_column else (weight, False)


def _is_bf16(weight: np.ndarray) -> bool:
    return bool(weight.dtype == np.dtype(ml_dtypes.bfloat16))
