from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.lazy import pack_rows
from l4convert.checkpoint.nibbles import transpose_packed


@given(st.integers(0, 40).map(lambda n: 2 * n), st.integers(1, 20), st.integers(0, 3))
def test_codes_change_rows_with_columns(rows: int, width: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 2 * width), np.int8)
    np.testing.assert_array_equal(transpose_packed(pack_rows(codes)), pack_rows(codes.T))


def test_large_matrices_are_turned_in_blocks() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (2090, 1030), np.int8)
    np.testing.assert_array_equal(transpose_packed(pack_rows(codes)), pack_rows(codes.T))
    strided = np.repeat(pack_rows(codes), 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(transpose_packed(strided), pack_rows(codes.T))
