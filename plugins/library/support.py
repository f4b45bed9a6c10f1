"""Whether a library can make the plugin that a node of a graph asks for, with kernels for one GPU: asked of itself."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import Structure, c_char_p, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path

from l4convert.errors import InputError
from l4convert.plugins.library.opening import open_library

Attribute = int | float | str

# nvinfer1::PluginFieldType
_FLOAT32, _INT32, _CHAR = 1, 5, 6
_WHY_BYTES = 1024


class _Field(Structure):
    """``nvinfer1::PluginField``."""

    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class _Collection(Structure):
    """``nvinfer1::PluginFieldCollection``."""

    _fields_ = (("count", c_int32), ("fields", ctypes.POINTER(_Field)))


def missing_support(library: Path, plugin: str, attributes: Mapping[str, Attribute], sm: int) -> str | None:
    """Why a library cannot make a plugin of these attributes for a compute capability; None where it can.

    Args:
        library: The file.
        plugin: As "MoE".
        attributes: Of the ONNX node.
        sm: 90 for 9.0.

    Raises:
        InputError: It is no library, or one without TensorRT plugins.
    """
    try:
        ask = open_library(library).l4_supports
    except AttributeError:
        raise InputError(
            f"{library}: has no TensorRT plugins",
            "pip install kernel-lens for TensorRT's headers, then l4convert plugins build --overwrite",
        ) from None
    kept = [_field(name, value) for name, value in attributes.items()]
    fields = (_Field * len(kept))(*(field for field, _ in kept))
    why = ctypes.create_string_buffer(_WHY_BYTES)
    ask.argtypes = [c_char_p, ctypes.POINTER(_Collection), c_int32, c_char_p, c_size_t]
    ask.restype = c_int32
    refused = ask(plugin.encode(), ctypes.byref(_Collection(len(kept), fields)), sm, why, _WHY_BYTES)
    return why.value.decode() if refused else None


def _field(name: str, value: Attribute) -> tuple[_Field, object]:
    """A field as ONNX-TensorRT makes it of an attribute, and what must live as long as it."""
    if isinstance(value, str):
        data: ctypes.Array[ctypes.c_char] | c_float | c_int32 = ctypes.create_string_buffer(value.encode())
        kind, length = _CHAR, len(value.encode()) + 1
    elif isinstance(value, float):
        data, kind, length = c_float(value), _FLOAT32, 1
    else:
        data, kind, length = c_int32(value), _INT32, 1
    return _Field(name.encode(), ctypes.cast(ctypes.byref(data), c_void_p), kind, length), data
