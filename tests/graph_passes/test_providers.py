"""What the tables of providers say yes and no to."""

from __future__ import annotations

import dataclasses

import pytest

from l4convert.graph_passes.providers import CPU, CUDA
from l4convert.plugins.long_context_attention.definition import AttentionSpec

LAYER = AttentionSpec(
    num_heads=40, kv_num_heads=8, head_dim=128, chunk_size=8192, rope=True, qk_norm_eps=1e-5, floor_scale=1.0,
    attn_scale=0.0, kv_cache="static", compute="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("provider", "head_dim", "reason"),
    [
        (CUDA, 128, None),
        (CUDA, 256, None),
        (CUDA, 512, "CUDA: GroupQueryAttention takes heads of at most 256, not 512"),
        (CUDA, 100, "GroupQueryAttention takes heads of a multiple of 8, not of 100"),
        (CPU, 512, None),
        (CPU, 100, "GroupQueryAttention takes heads of a multiple of 8, not of 100"),
    ],
)
def test_widths_of_heads(provider, head_dim, reason):
    assert provider.refuses_attention(dataclasses.replace(LAYER, head_dim=head_dim)) == reason


@pytest.mark.parametrize(
    ("change", "prepares"),
    [
        ({}, True),
        ({"qk_norm_eps": 0.0}, True),
        ({"qk_norm_eps": 0.0, "attn_scale": 0.1}, True),  # a factor commutes with a rotation
        ({"attn_scale": 0.1}, False),  # and not with a norm
        ({"head_dim": 24}, False),  # the kernel rotates multiples of 16
        ({"rope": False, "qk_norm_eps": 0.0}, False),  # there is nothing to prepare
    ],
)
def test_what_is_left_to_the_kernel(change, prepares):
    spec = dataclasses.replace(LAYER, **change)
    assert CUDA.prepares(spec) is prepares
    assert not CPU.prepares(spec)


@pytest.mark.parametrize(
    ("block", "hidden", "width", "cuda", "cpu"),
    [
        (32, 5120, 8192, None, None),
        (128, 5120, 8192, None, None),
        (16, 5120, 8192, "CUDA: QMoE takes blocks of 32, 64, 128, not of 16", None),
        (32, 96, 64, "CUDA: QMoE takes sizes that are multiples of 64, not 96 x 64", None),
        (128, 192, 128, *2 * ("QMoE takes experts whose sizes are multiples of the block, not 192 x 128",)),
    ],
)
def test_sizes_of_experts(block, hidden, width, cuda, cpu):
    assert CUDA.refuses_qmoe(block, hidden, width) == cuda
    assert CPU.refuses_qmoe(block, hidden, width) == cpu
