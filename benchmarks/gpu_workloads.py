"""The calls that ``benchmarks/gpu.py`` times: real shapes of Scout and Maverick, and what is asked of each.

A row's name is ``op, weights or cache, phase``. Both models have the same attention but for the norm of query and key,
which moves and multiplies nothing; so there is one set of those rows, with the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from roofline import Attention, Experts, Work

from l4convert.checkpoint.presets import PRESETS, SCOUT

K = 1024
CONTEXTS = {"8k": 8 * K, "128k": 128 * K, "1M": 1024 * K}
BATCHES = (1, 8, 64)
BLOCK, LARGE_BLOCK = 32, 128  # of INT4 weights: that of the recipe int4, and the largest

# What issue 6 asks for on an H100: fractions of the measured copy bandwidth and of the measured BF16 matrix rate, and
# how much faster the 8-bit prefill is than the 16-bit one.
COPY_FRACTION, MATRIX_FRACTION, FP8_SPEEDUP = 0.80, 0.55, 1.5


@dataclass(frozen=True)
class MoeRow:
    """One call of the MoE.

    Attributes:
        name: Of the row.
        experts: The layer.
        tokens: T.
        routing: "spread": token t chooses expert t mod E, so that as many as can be are read; "one": all choose the
            same; "random": each chooses any with equal odds.
        plain: The row of the same call with 16-bit weights, where this one is to be compared with it.
    """

    name: str
    experts: Experts
    tokens: int
    routing: str = "spread"
    plain: str = ""

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step, whose time is that of reading weights."""
        return self.tokens <= max(BATCHES)

    def chosen(self) -> np.ndarray:
        """Each token's expert, int64 [T]."""
        count = self.experts.num_experts
        if self.routing == "random":
            return np.random.default_rng(0).integers(0, count, self.tokens)
        return np.arange(self.tokens) % count if self.routing == "spread" else np.full(self.tokens, count // 2)

    @property
    def work(self) -> Work:
        return self.experts.work(self.tokens, len(np.unique(self.chosen())))

    @property
    def memory(self) -> int:
        """Bytes that the call needs on the device: all weights, and activations of both products."""
        layer = self.experts
        wide = 4 * (layer.intermediate_size + 2 * layer.hidden_size)
        return layer.num_experts * layer.expert_bytes + self.tokens * layer.top_k * wide


@dataclass(frozen=True)
class AttentionRow:
    """One call of the attention.

    Attributes:
        name: Of the row.
        attention: The layer.
        batch: Sequences, all equally long.
        new: New tokens of each.
        context: Its tokens with them.
    """

    name: str
    attention: Attention
    batch: int
    new: int
    context: int

    @property
    def decodes(self) -> bool:
        return self.new == 1

    @property
    def slots(self) -> int:
        """Of the static cache: M."""
        chunk = self.attention.chunk_size
        return min(chunk, self.context) if chunk else self.context

    @property
    def work(self) -> Work:
        return self.attention.work(self.batch, self.new, self.context)

    @property
    def memory(self) -> int:
        """Bytes that the call needs on the device: caches, positions, activations."""
        layer = self.attention
        width = (2 * layer.num_heads + 4 * layer.kv_num_heads) * layer.head_dim
        return self.batch * (self.slots * layer.slot_bytes + self.context * 8 + self.new * width * 4)


Row = MoeRow | AttentionRow


def _moe_rows() -> Iterator[MoeRow]:
    for model in ("scout", "maverick"):
        config = PRESETS[model]
        sizes = config.num_local_experts, config.hidden_size, config.intermediate_size, config.num_experts_per_tok
        for weights, block in (("int4", BLOCK), ("fp8", 0), ("plain", 0)):
            layer, name = Experts(*sizes, weights, block), f"{model} MoE {weights}"
            for tokens in BATCHES:
                yield MoeRow(f"{name}, decode {tokens}", layer, tokens)
            yield MoeRow(f"{name}, decode 64 to one expert", layer, 64, "one")
            plain = f"{model} MoE plain, prefill 8k" if weights == "fp8" else ""
            yield MoeRow(f"{name}, prefill 8k", layer, 8 * K, "random", plain)
    sizes = SCOUT.num_local_experts, SCOUT.hidden_size, SCOUT.intermediate_size, SCOUT.num_experts_per_tok
    yield MoeRow("scout MoE int4, prefill 8k to one expert", Experts(*sizes, "int4", BLOCK), 8 * K, "one")
    large = Experts(*sizes, "int4", LARGE_BLOCK)
    yield MoeRow("scout MoE int4 block 128, decode 8", large, 8)
    yield MoeRow("scout MoE int4 block 128, prefill 8k", large, 8 * K, "random")


def _attention_rows() -> Iterator[AttentionRow]:
    heads = SCOUT.num_attention_heads, SCOUT.num_key_value_heads, SCOUT.head_dim
    for kv in ("none", "fp8"):
        for kind, chunk in (("chunked", SCOUT.attention_chunk_size), ("global", 0)):
            layer, name = Attention(*heads, chunk, kv), f"{kind} attention, {'bf16' if kv == 'none' else kv} cache"
            for label, context in CONTEXTS.items():
                for batch in BATCHES:
                    yield AttentionRow(f"{name}, decode {batch} at {label}", layer, batch, 1, context)
            if not chunk:  # more than 2**31 numbers in either cache
                yield AttentionRow(f"{name}, decode 1 at 10M", layer, 1, 1, SCOUT.max_position_embeddings)
            yield AttentionRow(f"{name}, prefill 8k", layer, 1, 8 * K, 8 * K)
            # Chunked: four chunks in one call. Global: new tokens after a long past.
            further = ("32k, four chunks", 32 * K, 32 * K) if chunk else ("8k after 120k", 8 * K, 128 * K)
            yield AttentionRow(f"{name}, prefill {further[0]}", layer, 1, *further[1:])


MOE = tuple(_moe_rows())
ATTENTION = tuple(_attention_rows())
ROWS: tuple[Row, ...] = (*MOE, *ATTENTION)
