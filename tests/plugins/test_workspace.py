"""Scratch memory as plans count it, against what the library's launch code asks for."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from l4convert.planning.workspace import MULTIPROCESSORS, AttentionCall, Experts, MoeCall
from l4convert.plugins.library import native

CHOICES = 400


def test_experts(interpreted_library: native.Library) -> None:
    rng = np.random.default_rng(0)
    for _ in range(CHOICES):
        kind = get_args(Experts)[rng.integers(3)]
        experts, top = int(rng.integers(1, 129)), int(rng.integers(1, 5))
        hidden, width = (64 * int(rng.integers(1, 260)) for _ in range(2))
        tokens = int(rng.choice([1, 2, 7, 8, 63, 64, 65, 512, 8192, rng.integers(1, 20000)]))
        call = MoeCall(experts, hidden, width, min(top, experts), tokens, kind)
        sizes = (experts, hidden, width, call.top_k, 0, native.WEIGHTS[kind])
        asked = interpreted_library.moe_workspace(native.Moe(*sizes, *_blocks(kind, hidden, width)), tokens)
        assert call.bytes == asked, call


def _blocks(kind: str, hidden: int, width: int) -> tuple[int, int]:
    return {"plain": (0, 0), "int4": (32, 64), "fp8": (hidden, width)}[kind]


@pytest.mark.parametrize("multiprocessors", [4, 58, 132, MULTIPROCESSORS])
def test_attention(interpreted_library: native.Library, multiprocessors: int) -> None:
    rng = np.random.default_rng(multiprocessors)
    for _ in range(CHOICES):
        kv_heads, group, head_dim = int(rng.integers(1, 17)), int(rng.integers(1, 9)), int(rng.choice([16, 64, 128]))
        chunk, kind = int(rng.choice([0, 64, 8192])), str(rng.choice(list(native.KV_DTYPES)))
        batch, new = int(rng.integers(1, 65)), int(rng.choice([1, 1, 2, 100, 512, 8192]))
        seen = new + int(rng.choice([0, 1, 8191, 8192, 131071, 10_485_760, rng.integers(1, 1 << 21)]))
        call = AttentionCall(
            kv_heads * group, kv_heads, head_dim, chunk, batch, new, seen, 2 if kind == "none" else 1, multiprocessors
        )
        attention = native.Attention(
            kv_heads * group, kv_heads, head_dim, chunk, 1, 1e-5, 8192.0, 0.1, 0, native.KV_DTYPES[kind]
        )
        shape = native.AttentionShape(batch, new, seen, seen, seen)
        assert call.bytes == interpreted_library.attention_workspace(attention, shape, multiprocessors), call
