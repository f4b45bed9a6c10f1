"""Bytes of an artifact's key/value caches by length of context, from its graph; and whether they fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.emit.memory import available_bytes
from l4convert.emit.write import MODEL_FILE
from l4convert.errors import UsageError
from l4convert.progress import format_amount
from l4convert.quantization.kv import KV_FORMATS
from l4convert.runtime.manifest import ArtifactInfo, KvCache

LAYERS = ("global", "chunked")
_BLOCK = 1 << 20  # random numbers that are drawn; a larger cache repeats them


@dataclass(frozen=True)
class CacheSizes:
    """What one sequence's caches take.

    Attributes:
        form: Decides how many slots there are.
        chunk: C, the most slots of a chunked layer in the forms that have a limit.
        slot_bytes: Of one token in all layers of a kind, by kind.
    """

    form: KvCache
    chunk: int
    slot_bytes: Mapping[str, int]

    @classmethod
    def of(cls, info: ArtifactInfo) -> CacheSizes:
        """From the types of the inputs of an artifact's graph; its weights are not read."""
        from l4convert.emit.graph_refs import read_model

        heads, width = info.config.num_key_value_heads, info.config.head_dim
        graph = read_model(info.path / MODEL_FILE).graph
        slot_bytes = dict.fromkeys(LAYERS, 0)
        for value in graph.input:
            prefix, _, rest = value.name.partition(".")
            if prefix == "past_key_values":
                layer = info.config.layers[int(rest.partition(".")[0])]
                slot_bytes["chunked" if layer.chunked else "global"] += heads * _head_bytes(
                    value.type.tensor_type.elem_type, width
                )
        return cls(info.kv_cache, info.config.attention_chunk_size, slot_bytes)

    def used(self, length: int) -> dict[str, int]:
        """Bytes that hold something of a sequence of this length, between two calls; buffers may be longer.

        The windowed form gives a chunk up when it is full; static buffers keep it until it is written over.
        """
        chunked = {"growing": length, "windowed": length % self.chunk, "static": min(length, self.chunk)}[self.form]
        return {"global": self.slot_bytes["global"] * length, "chunked": self.slot_bytes["chunked"] * chunked}

    def at_once(self, length: int) -> int:
        """The most bytes during a call: caches that grow are there twice, as they were and as they become."""
        chunked = length if self.form == "growing" else min(length, self.chunk)
        total = self.slot_bytes["global"] * length + self.slot_bytes["chunked"] * chunked
        return total if self.form == "static" else 2 * total


def _head_bytes(element: int, width: int) -> int:
    """Of one token's key or value in one head: an element type that packs several numbers has fewer elements."""
    dtype = ir.DataType(element)
    packing = next((form.packing for form in KV_FORMATS.values() if form.storage == dtype), 1)
    return int(dtype.itemsize * width) // packing


def require_room(what: str, needed: int, available: int | None = None) -> None:
    """Refuse to begin what cannot end well.

    Args:
        what: Will take it.
        needed: Bytes.
        available: Bytes; None: what this machine has free.

    Raises:
        UsageError: It is more.
    """
    free = available_bytes() if available is None else available
    if free is not None and needed > free:
        raise UsageError(
            f"{what} takes {format_amount(needed, 'B')} of memory, and {format_amount(free, 'B')} are free",
            "ask for shorter contexts with --context",
        )


def random_cache(_name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A cache of random numbers, like those of normed keys; the same for every name. Made in place: it may be 10 GB."""
    array = np.empty(shape, dtype)
    flat = array.reshape(-1)
    numbers = _random(min(flat.size, _BLOCK), dtype)
    for begin in range(0, flat.size, _BLOCK):
        part = flat[begin : begin + _BLOCK]
        part[:] = numbers[: part.size]
    return array


def _random(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    return rng.standard_normal(count, np.float32).astype(dtype)
