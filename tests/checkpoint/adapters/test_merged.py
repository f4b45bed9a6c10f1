"""Tiles of merged weights."""

from __future__ import annotations

import pickle
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.adapters import is_merged
from l4convert.checkpoint.adapters.merged import Columns, EveryNth, Merged, Split, Update
from l4convert.checkpoint.combiners import Member, transposed
from l4convert.checkpoint.lazy import Constant
from l4convert.errors import InputError

RANDOM = np.random.default_rng(0)


def constant(*shape: int, dtype: type = np.float32) -> Constant:
    return Constant(RANDOM.standard_normal(shape, np.float32).astype(dtype), "weight")


EXPERTS = Merged(
    constant(3, 20, 30, dtype=ml_dtypes.bfloat16),
    [
        Update(EveryNth(constant(20, 4 * 3), 3), Split(constant(3 * 4, 30), 3), 0.5),
        Update(constant(20, 2), constant(2, 9), 2.0, batch=1, first=15),
    ],
)
WHOLE = EXPERTS.numpy()


def test_factors_of_experts_are_taken_as_peft_takes_them() -> None:
    a, b = RANDOM.standard_normal((3 * 4, 30)), RANDOM.standard_normal((20, 4 * 3))
    left, right = EveryNth(Constant(b), 3).numpy(), Split(Constant(a), 3).numpy()
    wanted = np.einsum("ore,eri->eoi", b.reshape(20, 4, 3), a.reshape(3, 4, 30))
    np.testing.assert_allclose(left @ right, wanted, rtol=1e-12)


@given(st.data())
def test_any_tile_is_that_part_of_the_whole(data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 2))
    rows, cols = (data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) for n in (20, 30))
    tile = EXPERTS.tile(batch, slice(*rows), slice(*cols))
    assert tile.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tile, WHOLE[batch, slice(*rows), slice(*cols)])


def test_an_update_of_one_matrix_and_some_columns_changes_nothing_else() -> None:
    base, update = constant(3, 20, 30), Update(constant(20, 2), constant(2, 9), 2.0, batch=1, first=15)
    changed = Merged(base, [update]).numpy() != base.numpy()
    assert changed[1, :, 15:24].all()
    changed[1, :, 15:24] = False
    assert not changed.any()


def test_columns_of_a_matrix() -> None:
    matrix = constant(6, 10)
    np.testing.assert_array_equal(Columns(matrix, slice(3, 8)).numpy(), matrix.numpy()[:, 3:8])


def test_it_can_be_sent_to_another_process() -> None:
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(EXPERTS)).numpy(), WHOLE)


def test_a_merged_weight_is_told_from_others() -> None:
    assert is_merged(transposed(Member(EXPERTS, 1)))
    assert not is_merged(transposed(constant(2, 2)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_must_be_finite(value: float) -> None:
    left = constant(20, 2)
    left.numpy()[3, 1] = value
    broken = np.array(left.numpy())
    broken[3, 1] = value
    merged = Merged(constant(20, 30), [Update(Constant(broken, "lora_B"), constant(2, 30), 1.0)])
    with pytest.raises(InputError, match=r"lora_B.* 1 NaN or infinite"):
        merged.numpy()


def test_memory_does_not_grow_with_the_rank() -> None:
    def peak(rank: int) -> int:
        merged = Merged(constant(256, 4096), [Update(constant(256, rank), constant(rank, 4096), 1.0)])
        tracemalloc.start()
        merged.tile(0, slice(0, 256), slice(0, 4096))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(1024) < peak(8) + (12 << 20)
