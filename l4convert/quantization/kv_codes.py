"""Elements of quantized caches in NumPy, for what is read and written outside a graph; ``kv`` says what they are."""

from __future__ import annotations

import numpy as np

from l4convert.quantization.kv import KV_FORMATS, KvDtype

#: A byte of two INT4 codes, both 0.
INT4_ZERO = 0x88


def quantize_kv(values: np.ndarray, scale: np.ndarray, dtype: KvDtype) -> np.ndarray:
    """Stored elements of keys or values.

    Args:
        values: [..., D], of any floating type.
        scale: float32, broadcasts to ``values``.
        dtype: Format of the elements.

    Returns:
        [..., D], for INT4 [..., D/2], of the storage type in NumPy (FP8: that of ml_dtypes).
    """
    elements = KV_FORMATS[dtype]
    quotient = values.astype(np.float32) * (np.float32(1) / scale)
    if dtype != "fp8":
        quotient = np.rint(quotient)
    codes = np.clip(quotient, elements.lowest, elements.highest)
    if dtype != "int4":
        return codes.astype(elements.storage.numpy())
    halves = (codes + 8).astype(np.uint8)
    packed: np.ndarray = halves[..., 0::2] | halves[..., 1::2] << 4
    return packed


def dequantize_kv(stored: np.ndarray, scale: np.ndarray, dtype: KvDtype) -> np.ndarray:
    """The float32 numbers [..., D] that stored elements stand for."""
    codes = stored
    if dtype == "int4":
        halves = np.stack([stored & 15, stored >> 4], axis=-1).astype(np.float32) - 8
        codes = halves.reshape(*stored.shape[:-1], 2 * stored.shape[-1])
    result: np.ndarray = codes.astype(np.float32) * scale
    return result
