"""One call of a plugin on real buffers, through TensorRT's own interfaces but without TensorRT (conformance/call.h).

Created from fields, configured, serialized, made again as a loaded engine makes it, attached, told its shapes: then
enqueued. Buffers are addresses of device memory in the CUDA context that is current; nothing here allocates or waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from l4convert.errors import DeviceError, InputError
from l4convert.plugins.library.support import Attribute

CORE = "libl4convert_conformance_core.so"

_MOST_DIMS, _WHY_BYTES, _MOST_OUTPUTS = 8, 512, 8
# nvinfer1::DataType -> name of NumPy or ml_dtypes.
_TYPES = {0: "float32", 1: "float16", 2: "int8", 3: "int32", 6: "float8_e4m3fn", 7: "bfloat16", 8: "int64"}


class _Field(Structure):
    _fields_ = (("name", c_char_p), ("kind", c_int32), ("integer", c_int32), ("real", c_float), ("text", c_char_p))


class _Tensor(Structure):
    _fields_ = (("type", c_int32), ("rank", c_int32), ("dims", c_int64 * _MOST_DIMS))


@dataclass(frozen=True)
class Tensor:
    """What a plugin takes or gives: element type (as NumPy and ml_dtypes name it) and shape."""

    dtype: str
    shape: tuple[int, ...]


class PluginCall:
    """A plugin that is ready to be enqueued.

    Args:
        library: The plugin library; what drives it lies beside it.
        plugin: As "MoE".
        attributes: Of the ONNX node.
        shapes: Of its inputs.

    Attributes:
        inputs, outputs: Types and shapes, as the plugin says.
        aliases: For each output the input whose buffer it is, or None.
        workspace: Bytes of scratch memory.

    Raises:
        InputError: There is no such library, or the plugin refuses something.
    """

    def __init__(
        self, library: Path, plugin: str, attributes: Mapping[str, Attribute], shapes: Sequence[Sequence[int]]
    ) -> None:
        self._core = _load(library.resolve().parent / CORE)
        fields = (_Field * len(attributes))(*(_field(name, value) for name, value in attributes.items()))
        inputs = (_Tensor * len(shapes))(*(_tensor(shape) for shape in shapes))
        outputs, count = (_Tensor * _MOST_OUTPUTS)(), c_int32()
        workspace, why = c_size_t(), ctypes.create_string_buffer(_WHY_BYTES)
        self._call: int | None = self._core.l4_conformance_open(
            str(library.resolve()).encode(), plugin.encode(), fields, len(fields), inputs, len(inputs), outputs,
            _MOST_OUTPUTS, byref(count), byref(workspace), why,
        )  # fmt: skip
        if not self._call:
            raise InputError(f"{library}: {why.value.decode()}")
        self.inputs = tuple(_described(tensor) for tensor in inputs)
        self.outputs = tuple(_described(tensor) for tensor in outputs[: count.value])
        self.aliases = tuple(self._alias(number) for number in range(count.value))
        self.workspace = int(workspace.value)

    def enqueue(self, inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int = 0) -> None:
        """Put the call on a stream.

        Args:
            inputs, outputs: Addresses, in order; that of an aliased output may be its input's.
            workspace: Address of :attr:`workspace` bytes.
            stream: Address of the stream; 0 is the default one.

        Raises:
            DeviceError: The plugin refuses; with its own words.
        """
        why = ctypes.create_string_buffer(_WHY_BYTES)
        given = [(c_void_p * len(addresses))(*addresses) for addresses in (inputs, outputs)]
        if self._core.l4_conformance_enqueue(self._call, *given, workspace, stream, why):
            raise DeviceError(why.value.decode())

    def close(self) -> None:
        """Destroy the plugin."""
        if self._call:
            self._core.l4_conformance_close(self._call)
            self._call = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _alias(self, output: int) -> int | None:
        found = int(self._core.l4_conformance_alias(self._call, output))
        return None if found < 0 else found


def _load(path: Path) -> ctypes.CDLL:
    try:
        core = ctypes.CDLL(str(path))
    except OSError:
        raise InputError(
            f"{path}: there is no such library",
            "l4convert plugins build makes it where there are TensorRT's headers: pip install kernel-lens",
        ) from None
    call = c_void_p
    core.l4_conformance_open.restype = call
    core.l4_conformance_open.argtypes = [
        c_char_p, c_char_p, POINTER(_Field), c_int32, POINTER(_Tensor), c_int32, POINTER(_Tensor), c_int32,
        POINTER(c_int32), POINTER(c_size_t), c_char_p,
    ]  # fmt: skip
    core.l4_conformance_alias.argtypes = [call, c_int32]
    core.l4_conformance_enqueue.argtypes = [call, POINTER(c_void_p), POINTER(c_void_p), c_void_p, c_void_p, c_char_p]
    core.l4_conformance_close.argtypes = [call]
    core.l4_conformance_close.restype = None
    return core


def _field(name: str, value: Attribute) -> _Field:
    if isinstance(value, str):
        return _Field(name.encode(), ord("s"), 0, 0.0, value.encode())
    if isinstance(value, float):
        return _Field(name.encode(), ord("f"), 0, value, None)
    return _Field(name.encode(), ord("i"), value, 0.0, None)


def _tensor(shape: Sequence[int]) -> _Tensor:
    return _Tensor(0, len(shape), (c_int64 * _MOST_DIMS)(*shape))


def _described(tensor: _Tensor) -> Tensor:
    return Tensor(_TYPES[tensor.type], tuple(tensor.dims[: tensor.rank]))
