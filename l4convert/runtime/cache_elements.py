"""What the elements of a cache are, by the type that ONNX Runtime names for its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from l4convert.quantization.kv import KV_FORMATS
from l4convert.quantization.kv_codes import INT4_ZERO

_FLOATS: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED: Mapping[str, np.dtype[Any]] = {
    "tensor(float8e4m3fn)": np.dtype(ml_dtypes.float8_e4m3fn),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class CacheElements:
    """Elements of one cache.

    Attributes:
        dtype: As stored.
        width: Stored elements of one head.
        zero: What stands for 0.
    """

    dtype: np.dtype[Any]
    width: int
    zero: int = 0

    def zeros(self, batch: int, heads: int, slots: int) -> np.ndarray:
        """A cache [batch, heads, slots, width] of zeros."""
        if not self.zero:
            return np.zeros((batch, heads, slots, self.width), self.dtype)  # memory that is taken when it is written
        return np.full((batch, heads, slots, self.width), self.zero, self.dtype)


def cache_elements(type_name: str, head_dim: int) -> CacheElements | None:
    """The elements behind a type as ``tensor(int8)``; None for one that no cache has. Bytes are pairs of INT4 codes."""
    if type_name == "tensor(uint8)":
        return CacheElements(_QUANTIZED[type_name], head_dim // KV_FORMATS["int4"].packing, INT4_ZERO)
    dtype = _FLOATS.get(type_name) or _QUANTIZED.get(type_name)
    return None if dtype is None else CacheElements(dtype, head_dim)


def mixed_types(type_names: set[str]) -> bool:
    """Whether caches have several floating types, or several quantized ones. One of each is a model half quantized."""
    return any(len(type_names & kind.keys()) > 1 for kind in (_FLOATS, _QUANTIZED))
