"""The three forms of key/value cache an artifact may have, and how each is carried from one call to the next."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig
from l4convert.runtime.cache_elements import CacheElements
from l4convert.runtime.manifest import KvCache
from l4convert.runtime.runner import FloatArray, IntArray


@dataclass(frozen=True)
class CacheNames:
    """Graph inputs and outputs of the caches, in one order, and what their shapes have in common.

    Attributes:
        past: Input names; ``present``: output names, in the same order.
        slots: Per name, the most slots that are ever in use at once (a chunked layer never looks further back than its
            chunk); None: every token.
        heads: Key/value heads; ``head_dim``: their width.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    slots: tuple[int | None, ...]
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: DecoderConfig) -> Self:
        """The names of DESIGN section 5 for a model."""
        pairs = [(i, kind) for i in range(config.num_hidden_layers) for kind in ("key", "value")]
        return cls(
            past=tuple(f"past_key_values.{i}.{kind}" for i, kind in pairs),
            present=tuple(f"present.{i}.{kind}" for i, kind in pairs),
            slots=tuple(config.attention_chunk_size if config.layers[i].chunked else None for i, _ in pairs),
            heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )


class KvCacheState(Protocol):
    """The caches of one batch."""

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        """Run the graph once, updating the caches.

        Args:
            feeds: ``input_ids`` [B, S] and ``attention_mask`` [B, columns + S].

        Returns:
            Logits [B, S, vocabulary].
        """
        ...


@dataclass(frozen=True)
class CacheRoom:
    """How large the caches of one batch are, and where.

    Attributes:
        batch: Sequences; ``max_length``: the most slots of one, in the static form.
        elements: Of each cache, by the name of its input.
        device: ``cpu`` or ``cuda``, the provider's memory.
    """

    batch: int
    max_length: int
    elements: Mapping[str, CacheElements]
    device: str = "cpu"

    def zeros(self, names: CacheNames, name: str, slots: int) -> Any:
        """A cache of so many slots, as an ``OrtValue`` on the device."""
        host = ort_value(self.elements[name].zeros(self.batch, names.heads, slots))
        return host if self.device == "cpu" else copy_to(host, self.device)


class FedBackCache:
    """Growing and windowed: what came out as present goes in as past, whatever its length; it starts with length 0."""

    def __init__(self, session: Any, names: CacheNames, room: CacheRoom) -> None:
        self._session = session
        self._names = names
        self._room = room
        self._past = [room.zeros(names, name, 0) for name in names.past]

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        """Run once; the caches stay in ONNX Runtime's memory and are never copied to numpy."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        for name, value in zip(self._names.past, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._names.present:
            binding.bind_output(name, self._room.device, 0)
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        return as_float32(logits)


class StaticCache:
    """Static: buffers made once and bound as past and as present, so that a call updates them in place."""

    def __init__(self, session: Any, names: CacheNames, room: CacheRoom) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._binding.bind_output("logits", "cpu")  # first, so that it is the first of get_outputs()
        self._buffers = []
        for past, present, slots in zip(names.past, names.present, names.slots, strict=True):
            # Zeros, because unused slots are masked by adding to their scores, and garbage may be NaN.
            buffer = room.zeros(names, past, room.max_length if slots is None else min(slots, room.max_length))
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)
            self._buffers.append(buffer)

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        """Run once, in place."""
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("logits", "cpu")  # anew: its shape differs from call to call
        self._session.run_with_iobinding(self._binding)
        return as_float32(self._binding.get_outputs()[0])


def ort_value(array: np.ndarray) -> Any:
    """An ``OrtValue`` on the CPU; of types that NumPy does not have, ONNX Runtime is given the bits and the type."""
    from onnxruntime import OrtValue

    if array.dtype in _FOREIGN:
        bits, dtype = _FOREIGN[array.dtype]
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(bits), int(dtype))
    return OrtValue.ortvalue_from_numpy(array)


_FOREIGN: Mapping[np.dtype[Any], tuple[type[np.generic], ir.DataType]] = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, ir.DataType.BFLOAT16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, ir.DataType.FLOAT8E4M3FN),
}


def copy_to(value: Any, device: str) -> Any:
    """A copy of an ``OrtValue`` in a provider's memory."""
    from onnxruntime import OrtValue

    copied = OrtValue.ortvalue_from_shape_and_type(value.shape(), value.element_type(), device, 0)
    if 0 not in value.shape():
        copied.update_inplace(value)
    return copied


def as_float32(value: Any) -> FloatArray:
    """The content of an ``OrtValue`` on the CPU, of any type; quantized caches give their codes."""
    dtype = ir.DataType(value.element_type()).numpy()
    if dtype not in _FOREIGN:
        result: FloatArray = np.asarray(value.numpy(), np.float32)
        return result
    shape = value.shape()
    # ONNX Runtime gives no array of a type that NumPy does not have.
    bits = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(bits, dtype).reshape(shape).astype(np.float32)


CACHE_FORMS: Mapping[KvCache, Callable[[Any, CacheNames, CacheRoom], KvCacheState]] = {
    "growing": FedBackCache,
    "windowed": FedBackCache,
    "static": StaticCache,
}
