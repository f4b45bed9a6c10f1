"""Bytes of the key/value caches, by kind of layer, type of element and form of the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, get_args

from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType
from l4convert.planning.figures import Figure
from l4convert.quantization.kv import KvDtype, KvScheme, kv_scheme

_SCALE_BYTES = 4  # float32, one a channel of a head as the graph holds them, for keys and for values


@dataclass(frozen=True)
class Caches:
    """The caches of a model on one device.

    Attributes:
        dtype: Of the elements, as a row of the plan names it: a compute type, or one of ``KvDtype``.
        form: ``growing``, ``windowed`` or ``static`` (DESIGN section 5).
        chunk: C: a chunked layer needs no more slots.
        heads, width: Key/value heads, and elements of one.
        global_layers, chunked_layers: How many there are of each.
        global_bits, chunked_bits: Of an element in each.
        scaled_layers: Layers with scales.
    """

    dtype: str
    form: str
    chunk: int
    heads: int
    width: int
    global_layers: int
    chunked_layers: int
    global_bits: int
    chunked_bits: int
    scaled_layers: int

    @classmethod
    def of(cls, config: DecoderConfig, form: str, compute: ComputeType, scheme: KvScheme | None) -> Self:
        """The caches of a model that computes in ``compute``, quantized as ``scheme`` says."""
        chunked = sum(layer.chunked for layer in config.layers)
        kinds = {False: config.num_hidden_layers - chunked, True: chunked}
        plain = int(COMPUTE_TYPES[compute].itemsize * 8)
        bits = {kind: plain if scheme is None or not scheme.covers(kind) else _bits(scheme) for kind in kinds}
        return cls(
            dtype=compute if scheme is None else scheme.dtype,
            form=form,
            chunk=config.attention_chunk_size,
            heads=config.num_key_value_heads,
            width=config.head_dim,
            global_layers=kinds[False],
            chunked_layers=kinds[True],
            global_bits=bits[False],
            chunked_bits=bits[True],
            scaled_layers=0 if scheme is None else sum(n for kind, n in kinds.items() if scheme.covers(kind)),
        )

    @property
    def copies(self) -> int:
        """How often a call holds them: what grows is read as past while it is written anew as present."""
        return 1 if self.form == "static" else 2

    def slot_bytes(self, chunked: bool) -> int:
        """Bytes of one token's key and value in one layer of a kind."""
        return 2 * self.heads * self.width * (self.chunked_bits if chunked else self.global_bits) // 8

    def slots(self, chunked: bool, tokens: int) -> int:
        """Slots that a sequence of ``tokens`` needs in a layer, at most."""
        return tokens if not chunked or self.form == "growing" else min(tokens, self.chunk)

    def held(self, chunked: bool, tokens: int) -> int:
        """Slots that are there after ``tokens``: a windowed cache gives a chunk's up when the next one begins."""
        return tokens % self.chunk if chunked and self.form == "windowed" else self.slots(chunked, tokens)

    def bytes(self, batch: int, tokens: int) -> dict[str, int]:
        """Most bytes of ``batch`` sequences of ``tokens``, by kind of layer, once; :attr:`copies` counts extra."""
        return {
            "global": batch * self.global_layers * self.slot_bytes(False) * self.slots(False, tokens),
            "chunked": batch * self.chunked_layers * self.slot_bytes(True) * self.slots(True, tokens),
        }

    def held_bytes(self, batch: int, tokens: int) -> dict[str, int]:
        """Bytes that are there after a call that ended at ``tokens``."""
        return {
            "global": batch * self.global_layers * self.slot_bytes(False) * self.held(False, tokens),
            "chunked": batch * self.chunked_layers * self.slot_bytes(True) * self.held(True, tokens),
        }

    @property
    def bytes_per_token(self) -> int:
        """By how much the caches of one long sequence grow with a token."""
        growing = self.chunked_layers * self.slot_bytes(True) if self.form == "growing" else 0
        return self.global_layers * self.slot_bytes(False) + growing

    @property
    def scale_bytes(self) -> int:
        """Of all scales: keys and values have their own."""
        return 2 * self.scaled_layers * self.heads * self.width * _SCALE_BYTES

    def rank(self, tensor_parallel: int) -> Self:
        """The caches on one of ``tensor_parallel`` GPUs: its share of the heads, at least one."""
        return replace(self, heads=max(1, self.heads // tensor_parallel))

    def figures(self, batch: int, tokens: int, groups: int = 1) -> list[Figure]:
        """The bytes of :meth:`bytes` on one GPU, as often as a call holds them, and the scales.

        Args:
            batch: Sequences.
            tokens: Of each.
            groups: Of GPUs that share the tokens of global layers; chunked layers have theirs in every group.
        """
        share = -(-tokens // groups)
        near = self.bytes(batch, tokens)["chunked"]
        sizes = {"global": self.bytes(batch, share)["global"], "chunked": near}
        twice = "" if self.copies == 1 else f"{self.copies} (past and present) x "
        kinds = (("global", False, self.global_layers), ("chunked", True, self.chunked_layers))
        lines = [
            Figure(
                f"caches, {kind} layers",
                self.copies * sizes[kind],
                "B",
                f"{twice}batch {batch} x {layers} layers x 2 (key, value) x {self.heads} heads x {self.width}"
                f" x {_element(self, chunked)} x {self._reach(chunked, tokens, groups)}",
            )
            for kind, chunked, layers in kinds
        ]
        if self.scaled_layers:
            arithmetic = f"{self.scaled_layers} layers x 2 x {self.heads} heads x {self.width} x {_SCALE_BYTES} B"
            lines.append(Figure("scales of the caches", self.scale_bytes, "B", arithmetic))
        return lines

    def _reach(self, chunked: bool, tokens: int, groups: int) -> str:
        if chunked and self.form != "growing":
            return f"{self.slots(chunked, tokens):,} slots; at most a chunk"
        if chunked or groups == 1:
            return f"{tokens:,} tokens"
        return f"{-(-tokens // groups):,} tokens; {tokens:,} shared by {groups} groups"


def cache_choices(config: DecoderConfig, form: str, compute: ComputeType, chosen: KvScheme | None) -> list[Caches]:
    """One row for each type that caches can have, that of the recipe with its own granularity and layers."""
    schemes = [None, *(kv_scheme(dtype) for dtype in get_args(KvDtype))]
    if chosen is not None:
        schemes = [chosen if scheme and scheme.dtype == chosen.dtype else scheme for scheme in schemes]
    return [Caches.of(config, form, compute, scheme) for scheme in schemes]


def _bits(scheme: KvScheme) -> int:
    return int(scheme.format.storage.itemsize * 8) // scheme.format.packing


def _element(caches: Caches, chunked: bool) -> str:
    bits = caches.chunked_bits if chunked else caches.global_bits
    return f"{bits / 8:g} B"
