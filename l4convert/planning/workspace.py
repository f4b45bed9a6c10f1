"""Scratch memory that the TensorRT plugins ask for: the formulas of plugins/*/launch.cpp, which a plan cannot call.

A plan is made where no library was built. ``tests/plugins/test_workspace.py`` compares every function here with what
the library answers, over many shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Experts = Literal["plain", "int4", "fp8"]

#: Multiprocessors that an engine's workspace is made for, wherever it is built (plugins/library/plugin.cpp).
MULTIPROCESSORS = 192

_PIECE = 256  # pieces begin at multiples of it
# plugins/moe/launch.cpp
_ROUTED_AT_ONCE = 64
_MOST_EXPERTS = 128
_SMALLEST_TILE: Mapping[Experts, int] = {"plain": 16, "int4": 8, "fp8": 16}
# plugins/long_context_attention/launch.cpp
_BLOCKS_A_MULTIPROCESSOR = 2
#: Keys that decode would have in a part, however many sequences there are.
PART_TOKENS = 8192
_MOST_PARTS = 1024
_MOST_PREFILL_ROWS = 128


@dataclass(frozen=True)
class MoeCall:
    """Sizes of one call of ``l4convert::MoE``, and how its weights are stored."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    tokens: int
    weights: Experts

    @property
    def pieces(self) -> dict[str, int]:
        """Bytes of each piece, by what it holds; those that the call has no use for are left out."""
        rows, fp8 = self.tokens * self.top_k, self.weights == "fp8"
        tiles = rows // _SMALLEST_TILE[self.weights] + min(self.num_experts, rows)
        stepwise = self.tokens > _ROUTED_AT_ONCE
        blocks = -(-self.tokens // _ROUTED_AT_ONCE)
        sizes = {
            "scaled rows": rows * self.hidden_size * (1 if fp8 else 2),
            "scales of rows": rows * 4 * fp8,
            "where rows go": rows * 4,
            "tiles": tiles * 16,
            "choices": rows * 4 * stepwise,
            "counts": blocks * _MOST_EXPERTS * 4 * stepwise,
            "hidden values": rows * self.intermediate_size * 2,
            "codes of hidden values": rows * self.intermediate_size * fp8,
            "results of each choice": rows * self.hidden_size * 2 * (self.top_k > 1),
        }
        return {name: _aligned(size) for name, size in sizes.items() if size}

    @property
    def bytes(self) -> int:
        """All of them; never nothing."""
        return max(sum(self.pieces.values()), _PIECE)


@dataclass(frozen=True)
class AttentionCall:
    """Sizes of one call of ``l4convert::LongContextAttention``.

    Attributes:
        chunk_size: 0 for a global layer.
        new_tokens, seen_tokens: S and T of the op.
        element_bytes: Of the cache: 2, or 1 where it is quantized.
        multiprocessors: Of the GPU.
    """

    num_heads: int
    kv_num_heads: int
    head_dim: int
    chunk_size: int
    batch: int
    new_tokens: int
    seen_tokens: int
    element_bytes: int
    multiprocessors: int = MULTIPROCESSORS

    @property
    def group(self) -> int:
        """Query heads to a key/value head."""
        return self.num_heads // self.kv_num_heads

    @property
    def part_bytes(self) -> int:
        """Of what one part of the keys gives a row: a sum over the head, and two numbers; float32."""
        return (self.head_dim + 2) * 4

    @property
    def parts(self) -> int:
        """Into how many parts decode may cut the keys of all sequences and heads."""
        reach = min(self.chunk_size, self.seen_tokens) if self.chunk_size else self.seen_tokens
        most = min(_MOST_PARTS, 2 * -(-reach // PART_TOKENS))
        rows = self.batch * self.kv_num_heads
        return max(2 * _BLOCKS_A_MULTIPROCESSOR * self.multiprocessors, rows * max(2, most))

    @property
    def decode_bytes(self) -> int:
        """For one new token a sequence: what the parts give."""
        return self.parts * self.group * self.part_bytes + 3 * _PIECE

    @property
    def prefill_pieces(self) -> dict[str, int]:
        """For more: positions, new keys and values, and what parts give where there are too few tiles of queries."""
        new = self.batch * self.new_tokens * self.kv_num_heads * self.head_dim
        return {
            "positions": _aligned(self.batch * 32),
            "new keys": _aligned(new * self.element_bytes),
            "new values": _aligned(new * self.element_bytes),
            "partial results": self.multiprocessors * _MOST_PREFILL_ROWS * self.part_bytes + 3 * _PIECE,
        }

    @property
    def bytes(self) -> int:
        """What a call asks for."""
        prefill = sum(self.prefill_pieces.values()) if self.new_tokens > 1 else 0
        return max(self.decode_bytes, prefill)


def _aligned(size: int) -> int:
    return -(-size // _PIECE) * _PIECE
