"""Random calls that every kernel is checked with: ragged, at the edges of chunks, with all that a variant can have.

A group is one row of the table: an op in one form of weights or cache and one compute type. Its cases are drawn anew
from a seed. Sizes come from a :class:`Scale`, so that the same code checks a GPU and the interpreter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from roofline import Attention, Experts

from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.plugins.moe.definition import MoESpec

Compute = Literal["bfloat16", "float16"]
LAST_POSITION = 10_485_759  # of Scout
# Relative errors. The first is issue 6's for bfloat16; float16 and quantized caches are held to the same. Where
# activations are rounded to FP8, one whose exact value lies between two of its steps may go to either, 6 % apart.
LARGEST_ERROR, LARGEST_FP8_ERROR = 1e-2, 5e-2


@dataclass(frozen=True)
class Scale:
    """How large the cases are.

    Attributes:
        tokens: T of the MoE's cases.
        experts: E is drawn from these; ``widths``: H and I, multiples of 128.
        head_dim: D; ``key_heads``: Hk is drawn from these, or 8 for single tokens; Hq is five times that.
        chunks: C of chunked layers is drawn from these.
        lengths: Tokens in the cache before a call, at most, in global layers; in chunked ones the edges of chunks, too.
        new: Tokens of a call, at most.
    """

    tokens: tuple[int, ...] = (1, 2, 7, 8, 16, 17, 63, 64, 65, 200, 1031)
    experts: tuple[int, ...] = (4, 16, 128)
    widths: tuple[int, ...] = (128, 256, 384, 640)
    head_dim: int = 128
    key_heads: tuple[int, ...] = (1, 2)
    chunks: tuple[int, ...] = (256, 8192)
    lengths: int = 3000
    new: int = 700


@dataclass(frozen=True)
class MoeCase:
    """One call of the MoE; ``chosen``: int [T,K], each token's experts."""

    experts: Experts
    spec: MoESpec
    chosen: np.ndarray

    def __str__(self) -> str:
        spec = self.spec
        sizes = f"E {spec.num_experts}, H {spec.hidden_size}, I {spec.intermediate_size}, top {spec.top_k}"
        return f"{len(self.chosen)} tokens to {len(np.unique(self.chosen))} experts, {sizes}"


@dataclass(frozen=True)
class Sequence:
    """One sequence of a call: ``past`` tokens in the cache, then ``count`` new ones, ``skipped`` columns into it."""

    past: int
    count: int
    skipped: int


@dataclass(frozen=True)
class AttentionCase:
    """One call of the attention: sequences that are given up to ``new`` tokens each, and a cache of ``slots`` slots."""

    layer: Attention
    spec: AttentionSpec
    sequences: tuple[Sequence, ...]
    new: int
    slots: int

    @property
    def positions(self) -> np.ndarray:
        """Int64 [B,T], -1 is padding; the last ``new`` columns are the call's. Made when asked for: T may be large."""
        found = np.full((len(self.sequences), columns(self.sequences, self.new)), -1, np.int64)
        for row, sequence in zip(found, self.sequences, strict=True):
            begin = len(row) - self.new + sequence.skipped
            row[: sequence.past] = np.arange(sequence.past)
            row[begin : begin + sequence.count] = np.arange(sequence.past, sequence.past + sequence.count)
        return found

    def __str__(self) -> str:
        ends = ", ".join(f"{sequence.past}+{sequence.count}" for sequence in self.sequences)
        heads = f"{self.spec.num_heads}:{self.spec.kv_num_heads} heads"
        return f"{ends} tokens in a call of {self.new}, {self.slots} slots, {heads}, C {self.spec.chunk_size}"


def columns(sequences: Iterable[Sequence], new: int) -> int:
    """T: of the longest sequence's past, and of the call."""
    return max(sequence.past for sequence in sequences) + new


Case = MoeCase | AttentionCase


@dataclass(frozen=True)
class Group:
    """A row of cases; ``least_sm``: the oldest GPU that has its kernels; ``bound``: of relative errors."""

    name: str
    cases: tuple[Case, ...]
    least_sm: int = 80
    bound: float = LARGEST_ERROR


def groups(scale: Scale, seed: int = 0) -> Iterator[Group]:
    """All of them: every form of weights and of caches in both compute types."""
    rng = np.random.default_rng(seed)
    computes: tuple[Compute, ...] = ("bfloat16", "float16")
    for compute in computes:
        for weights, block in (("int4", 32), ("int4", 64), ("int4", 128), ("fp8", 0), ("plain", 0)):
            name = f"MoE {weights}{f' block {block}' if block else ''} {compute}"
            cases = tuple(moe_case(rng, scale, weights, block, compute, tokens) for tokens in scale.tokens)
            yield Group(name, cases, *((89, LARGEST_FP8_ERROR) if weights == "fp8" else ()))
    for compute in computes:
        for kv in ("none", "fp8", "int8"):
            cache = compute if kv == "none" else kv
            for kind in ("chunked", "global"):
                cases = tuple(attention_cases(rng, scale, kind, kv, compute))
                yield Group(f"{kind} attention {compute}, {cache} cache", cases)


def moe_case(
    rng: np.random.Generator, scale: Scale, weights: str, block: int, compute: Compute, tokens: int
) -> MoeCase:
    """Random sizes; tokens choose at random, all the same, or each another one."""
    count, top_k = int(rng.choice(scale.experts)), int(rng.integers(1, 3))
    # The bodies compute every expert for every token: many experts are small ones.
    widths = scale.widths if count * tokens < 20_000 else scale.widths[:2]
    hidden, width = (int(size) for size in rng.choice(widths, 2))
    experts = Experts(count, hidden, width, top_k, weights, block)
    first = {
        "random": rng.integers(0, count, tokens),
        "one": np.full(tokens, rng.integers(count)),
        "spread": np.arange(tokens) % count,
    }[str(rng.choice(["random", "one", "spread"]))]
    chosen = (first[:, None] + np.arange(top_k) * int(rng.integers(1, count))) % count
    activations: Literal["", "fp8"] = "fp8" if weights == "fp8" else ""
    return MoeCase(experts, MoESpec(count, hidden, width, top_k, activations, compute), chosen)


def attention_cases(
    rng: np.random.Generator, scale: Scale, kind: str, kv: str, compute: Compute
) -> Iterator[AttentionCase]:
    """Single tokens and long calls, of one sequence and of ragged batches; chunked: around C, and at the end."""
    chunk = 0
    for new in (1, int(rng.integers(2, 20)), scale.new):
        chunk = int(rng.choice(scale.chunks)) if kind == "chunked" else 0
        edges = [chunk - 2, chunk - 1, chunk, chunk + 1] if chunk else [0, 1, scale.lengths]
        for past in edges:
            yield attention_case(rng, scale, chunk, kv, compute, [past], new)
        ragged = rng.integers(0, scale.lengths, 5).tolist()
        yield attention_case(rng, scale, chunk, kv, compute, ragged, new)
    if chunk:  # a global layer's cache would not fit
        yield attention_case(rng, scale, chunk, kv, compute, [LAST_POSITION], 1)


def attention_case(
    rng: np.random.Generator, scale: Scale, chunk: int, kv: str, compute: Compute, past: list[int], new: int
) -> AttentionCase:
    """Sequences with ``past`` tokens in the cache; all but the first get fewer new ones, with padding around them."""
    key_heads = int(rng.choice([*scale.key_heads, *([8] if new == 1 else [])]))
    layer = Attention(5 * key_heads, key_heads, scale.head_dim, chunk, kv)
    counts = [new, *rng.integers(0, new + 1, len(past) - 1).tolist()]
    sequences = tuple(
        Sequence(length, count, int(rng.integers(0, new - count + 1)))
        for length, count in zip(past, counts, strict=True)
    )
    slots = (chunk or columns(sequences, new)) + 16 * int(rng.integers(0, 3))
    spec = AttentionSpec(
        layer.num_heads, key_heads, scale.head_dim, chunk, rope=bool(chunk), qk_norm_eps=1e-5 if chunk else 0.0,
        floor_scale=8192.0 if scale.lengths > 8192 else 64.0, attn_scale=0.0 if chunk else 0.1, kv_cache="static",
        compute=compute, kv_dtype=kv,  # type: ignore[arg-type]
    )  # fmt: skip
    if chunk and rng.integers(2):
        spec = replace(spec, qk_norm_eps=0.0)  # Maverick has none
    return AttentionCase(layer, spec, sequences, new, slots)
