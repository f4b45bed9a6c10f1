"""The MoE kernels, through the library, against the op's definition."""

from __future__ import annotations

import pytest

from tests.plugins.moe import BF16, FP16, Call, make_case, relative_error

BOUND = {"int4": 1e-2, "plain": 1e-2, "fp8": 3e-2}


@pytest.mark.parametrize(
    ("weights", "tokens", "experts", "hidden", "width", "top_k", "blocks", "compute"),
    [
        ("int4", 1, 4, 64, 64, 1, (32, 32), BF16),
        ("int4", 5, 3, 128, 192, 2, (64, 32), FP16),
        ("int4", 70, 5, 128, 128, 1, (128, 64), BF16),
        ("fp8", 7, 6, 128, 64, 1, (0, 0), BF16),
        ("plain", 9, 16, 64, 128, 2, (0, 0), BF16),
    ],
)
def test_the_kernels_equal_the_definition(gpu, weights, tokens, experts, hidden, width, top_k, blocks, compute):
    case = make_case(weights, tokens, experts, hidden, width, top_k, blocks, compute)
    actual = Call.of(gpu, case).run()
    print(relative_error(actual, case.expected), gpu.launches and [(l.kernel.name, l.grid) for l in gpu.launches])
    assert relative_error(actual, case.expected) <= BOUND[weights]
