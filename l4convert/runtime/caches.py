"""The three forms of key/value cache an artifact may have, and how each is carried from one call to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.runtime.cache_elements import CacheElements
from l4convert.runtime.manifest import KvCache
from l4convert.runtime.ort_values import as_float32, copy_to, ort_value, repeated, without_last
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

    def chunked_slots(self, caches: Sequence[Any]) -> int:
        """The fewest slots of a chunked layer's cache; 0 in a model that has none."""
        return min((c.shape()[2] for c, slots in zip(caches, self.slots, strict=True) if slots is not None), default=0)

    def nbytes(self, caches: Sequence[Any]) -> dict[str, int]:
        """Bytes of the caches of ``global`` and of ``chunked`` layers."""
        total = {"global": 0, "chunked": 0}
        for value, slots in zip(caches, self.slots, strict=True):
            total["global" if slots is None else "chunked"] += value.tensor_size_in_bytes()
        return total


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

    @property
    def chunked_slots(self) -> int:
        """Slots that every chunked layer has now."""
        ...

    def nbytes(self) -> dict[str, int]:
        """Bytes of the caches of ``global`` and of ``chunked`` layers."""
        ...

    def drop_last(self, slots: int) -> None:
        """Forget so many last slots of every layer, or all it has. Never asked of static caches."""
        ...

    def fork(self, copies: int | None) -> Self:
        """Caches of their own with the same content; of one row, ``copies`` rows."""
        ...


class CacheSource(Protocol):
    """Makes the content of a cache."""

    def __call__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], /) -> np.ndarray:
        """An array for an input of the graph."""
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

    def filled(self, names: CacheNames, name: str, slots: int, source: CacheSource) -> Any:
        """A cache with content, as an ``OrtValue`` on the device; on the CPU it is the source's array.

        Raises:
            ValueError: The source gives an array of another shape or type, or one that is not contiguous.
        """
        elements = self.elements[name]
        shape = (self.batch, names.heads, slots, elements.width)
        array = source(name, shape, elements.dtype)
        if array.shape != shape or array.dtype != elements.dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"cache {name} is {array.dtype} {array.shape}, expected contiguous {elements.dtype} {shape}"
            )
        host = ort_value(array)
        return host if self.device == "cpu" else copy_to(host, self.device)


class FedBackCache:
    """Growing and windowed: what came out as present goes in as past, whatever its length; it starts with length 0."""

    def __init__(self, session: Any, names: CacheNames, room: CacheRoom, values: Sequence[Any] | None = None) -> None:
        self._session = session
        self._names = names
        self._room = room
        self._past = list(values) if values else [room.zeros(names, name, 0) for name in names.past]

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

    @property
    def chunked_slots(self) -> int:
        """See :class:`KvCacheState`."""
        return self._names.chunked_slots(self._past)

    def nbytes(self) -> dict[str, int]:
        """See :class:`KvCacheState`."""
        return self._names.nbytes(self._past)

    def drop_last(self, slots: int) -> None:
        """See :class:`KvCacheState`: the rest is copied, a layer at a time."""
        for index, value in enumerate(self._past):
            self._past[index] = without_last(value, slots)

    def fork(self, copies: int | None) -> FedBackCache:
        """See :class:`KvCacheState`: without copies both share what is never written to."""
        values = self._past if copies is None else [repeated(value, copies) for value in self._past]
        room = self._room if copies is None else replace(self._room, batch=copies)
        return FedBackCache(self._session, self._names, room, values)


class StaticCache:
    """Static: buffers made once and bound as past and as present, so that a call updates them in place."""

    def __init__(self, session: Any, names: CacheNames, room: CacheRoom, values: Sequence[Any] | None = None) -> None:
        self._session = session
        self._names = names
        self._room = room
        self._binding = session.io_binding()
        self._binding.bind_output("logits", "cpu")  # first, so that it is the first of get_outputs()
        # Zeros, because unused slots are masked by adding to their scores, and garbage may be NaN.
        sizes = zip(names.past, static_slots(names, room), strict=True)
        self._buffers = list(values) if values else [room.zeros(names, name, slots) for name, slots in sizes]
        for past, present, buffer in zip(names.past, names.present, self._buffers, strict=True):
            self._binding.bind_ortvalue_input(past, buffer)
            self._binding.bind_ortvalue_output(present, buffer)

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        """Run once, in place."""
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        self._binding.bind_output("logits", "cpu")  # anew: its shape differs from call to call
        self._session.run_with_iobinding(self._binding)
        return as_float32(self._binding.get_outputs()[0])

    @property
    def chunked_slots(self) -> int:
        """See :class:`KvCacheState`."""
        return self._names.chunked_slots(self._buffers)

    def nbytes(self) -> dict[str, int]:
        """See :class:`KvCacheState`: all of the buffers, however much of them is used."""
        return self._names.nbytes(self._buffers)

    def drop_last(self, slots: int) -> None:
        """See :class:`KvCacheState`.

        Raises:
            ValueError: Always; buffers keep their size.
        """
        raise ValueError(f"{slots} slots cannot be dropped from buffers")

    def fork(self, copies: int | None) -> StaticCache:
        """See :class:`KvCacheState`: buffers of their own."""
        batch = self._room.batch if copies is None else copies
        values = [repeated(buffer, copies or 1) for buffer in self._buffers]
        return StaticCache(self._session, self._names, replace(self._room, batch=batch), values)


def static_slots(names: CacheNames, room: CacheRoom) -> list[int]:
    """Slots of each static buffer: what is ever in use at once."""
    return [room.max_length if slots is None else min(slots, room.max_length) for slots in names.slots]


def restored_slots(form: KvCache, names: CacheNames, lengths: IntArray, room: CacheRoom) -> list[int]:
    """Slots of each cache that holds rows of these lengths [B]."""
    if form == "static":
        return static_slots(names, room)
    longest = int(lengths.max())
    if form == "growing":
        return [longest] * len(names.past)
    return [longest if chunk is None else int((lengths % chunk).max()) for chunk in names.slots]


class CacheForm(Protocol):
    """Makes the caches of a batch: empty, or of given values for each name."""

    def __call__(
        self, session: Any, names: CacheNames, room: CacheRoom, values: Sequence[Any] | None = None
    ) -> KvCacheState:
        """The caches."""
        ...


CACHE_FORMS: Mapping[KvCache, CacheForm] = {
    "growing": FedBackCache,
    "windowed": FedBackCache,
    "static": StaticCache,
}
