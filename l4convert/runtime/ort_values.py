"""ONNX Runtime's values and NumPy's arrays: of every type, on every device."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.runtime.runner import FloatArray


def ort_value(array: np.ndarray) -> Any:
    """An ``OrtValue`` on the CPU that is the array; of types that NumPy lacks, ONNX Runtime is given bits and type."""
    from onnxruntime import OrtValue

    if array.dtype.isbuiltin == 1:
        return OrtValue.ortvalue_from_numpy(array)
    bits = array.view(f"u{array.dtype.itemsize}")
    return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(ir.DataType.from_numpy(array.dtype)))


def copy_to(value: Any, device: str) -> Any:
    """A copy of an ``OrtValue`` in a provider's memory."""
    from onnxruntime import OrtValue

    copied = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device, 0)
    if 0 not in value.shape():
        copied.update_inplace(value)
    return copied


def host_array(value: Any) -> np.ndarray:
    """What an ``OrtValue`` on the CPU holds, without a copy, of any type; the value must outlive it."""
    shape, dtype = value.shape(), ir.DataType(value.element_type()).numpy()
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    # ONNX Runtime gives no array of a type that NumPy does not have.
    return np.frombuffer((ctypes.c_uint8 * size).from_address(value.data_ptr()), dtype).reshape(shape)


def without_last(value: Any, slots: int) -> Any:
    """A copy of a cache [B, heads, N, width], on its device, without the last slots, at most all it has."""
    device = value.device_name()
    host = value if device == "cpu" else copy_to(value, "cpu")
    kept = ort_value(np.ascontiguousarray(host_array(host)[:, :, : max(0, value.shape()[2] - slots)]))
    return kept if device == "cpu" else copy_to(kept, device)


def repeated(value: Any, copies: int) -> Any:
    """A copy of a cache, on its device, with each row so many times."""
    device = value.device_name()
    if copies == 1:
        return copy_to(value, device)
    host = value if device == "cpu" else copy_to(value, "cpu")
    rows = ort_value(np.repeat(host_array(host), copies, axis=0))
    return rows if device == "cpu" else copy_to(rows, device)


def as_float32(value: Any) -> FloatArray:
    """A copy of what an ``OrtValue`` on the CPU holds, of any floating type."""
    if value.element_type() == ir.DataType.FLOAT:
        result: FloatArray = value.numpy()
        return result
    return host_array(value).astype(np.float32)
