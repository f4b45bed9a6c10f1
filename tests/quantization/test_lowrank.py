from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4convert.quantization import native
from l4convert.quantization.lowrank import add_low_rank, add_low_rank_in_numpy

needs_kernels = pytest.mark.skipif(not native.AVAILABLE, reason="the kernels are not built")


def random(rows: int, ranks: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix, and factors that float32 has."""
    generator = np.random.default_rng(seed)
    shapes = [(rows, columns), (rows, ranks), (ranks, columns)]
    total, left, right = (generator.standard_normal(shape, np.float32) for shape in shapes)
    return total, left.astype(np.float64), right.astype(np.float64)


def test_it_is_a_product_in_float64_rounded_once() -> None:
    total, left, right = random(50, 20, 70)
    wanted = torch.from_numpy(total) + 0.3 * (torch.from_numpy(left) @ torch.from_numpy(right))
    add_low_rank(total, left, right, 0.3)
    np.testing.assert_array_equal(total, wanted.float().numpy())


@needs_kernels
@pytest.mark.parametrize("level", [0, 1, 2])
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 80), st.integers(0, 9))
def test_the_kernel_gives_the_bytes_of_the_definition(
    level: int, rows: int, ranks: int, columns: int, seed: int
) -> None:
    total, left, right = random(rows, ranks, columns, seed)
    wide = np.zeros((rows, columns + 5), np.float32)  # rows further apart than they are long
    ours, wanted = wide[:, 2 : columns + 2], total.copy()
    ours[...] = total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_LEVEL", level)
        native.add_low_rank(ours, left, right, 1.7)
    add_low_rank_in_numpy(wanted, left, right, 1.7)
    np.testing.assert_array_equal(ours.view(np.uint32), wanted.view(np.uint32))
    assert not wide[:, :2].any()
    assert not wide[:, columns + 2 :].any()


def test_a_part_is_the_same_as_that_part_of_the_whole() -> None:
    total, left, right = random(40, 16, 100)
    part = total[3:17, 5:66].copy()
    add_low_rank(total, left, right, 2.0)
    add_low_rank(part, left[3:17].copy(), right[:, 5:66].copy(), 2.0)
    np.testing.assert_array_equal(part, total[3:17, 5:66])


@needs_kernels
def test_the_kernel_refuses_what_it_would_misread() -> None:
    total, left, right = random(4, 3, 5)
    for wrong in [
        (total, left.T, right),
        (total, left, right[:, :4]),
        (total.T, left, right),
        (total, left, right[:2]),
    ]:
        with pytest.raises(ValueError, match=r"product|C order|contiguous"):
            native.add_low_rank(*wrong, 1.0)
    with pytest.raises(ValueError, match="C order"):
        native.add_low_rank(total, left.astype(np.float32), right, 1.0)
