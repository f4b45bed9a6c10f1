"""Packed integers, against the library that packs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.lazy import Constant, pack_rows
from l4convert.checkpoint.quantized.packed import Unpacked, UnpackedRows


def integers(bits: int, rows: int, cols: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.random.default_rng(rows * cols).integers(-half, half, (rows, cols), np.int8)


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 40), st.data())
def test_any_part_is_what_was_packed(bits: int, rows: int, cols: int, data: st.DataObject) -> None:
    values = integers(bits, rows, cols)
    words = pack_to_int32(torch.from_numpy(values), bits).numpy()
    tensor = Unpacked(Constant(words), bits, cols)
    start = data.draw(st.integers(0, cols - 1))
    stop = data.draw(st.integers(start + 1, cols))
    part = slice(start, stop)
    np.testing.assert_array_equal(tensor.tile(0, slice(0, rows), part).astype(np.int8), values[:, part])
    if bits == 4:
        even = slice(start // 2 * 2, cols if stop == cols else stop // 2 * 2)
        if even.start < even.stop:
            expected = pack_rows(values[:, even])
            np.testing.assert_array_equal(tensor.packed(0, slice(0, rows), even), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [8, 13])
def test_zero_points_are_packed_along_rows(bits: int, rows: int) -> None:
    values = integers(bits, rows, 3)
    words = pack_to_int32(torch.from_numpy(values), bits, packed_dim=0).numpy()
    tensor = UnpackedRows(Constant(words), bits, rows)
    np.testing.assert_array_equal(tensor.numpy(), values)
    np.testing.assert_array_equal(tensor.tile(0, slice(3, 7), slice(1, 3)), values[3:7, 1:3])


def test_words_that_do_not_lie_together_are_read_right() -> None:
    values = integers(4, 4, 32)
    words = np.asfortranarray(pack_to_int32(torch.from_numpy(values), 4).numpy())
    np.testing.assert_array_equal(Unpacked(Constant(words), 4, 32).numpy().astype(np.int8), values)
