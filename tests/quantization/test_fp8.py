from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from l4convert.checkpoint.combiners import Transposed
from l4convert.checkpoint.lazy import Constant
from l4convert.errors import InputError
from l4convert.quantization.fp8 import quantize_fp8, to_e4m3


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_equals_torch(dtype: type) -> None:
    weight = random(3, 8, 50).astype(dtype)
    values, scales = quantize_fp8(Constant(weight))
    assert (values.dtype, scales.dtype) == (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT)
    assert (values.dims, scales.dims) == ((3, 8, 50), (3, 8, 1))
    reference = torch.from_numpy(weight.astype(np.float32))
    expected_scales = reference.abs().amax(-1, keepdim=True) / 448
    expected = (reference / expected_scales).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(scales.numpy(), expected_scales.numpy())
    assert values.tobytes() == expected.view(torch.uint8).numpy().tobytes()


@settings(max_examples=60)
@given(
    hnp.arrays(
        np.float32, (3, 5), elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_any_finite_row_is_within_the_formats_precision(weight: np.ndarray) -> None:
    values, scales = (tensor.numpy().astype(np.float64) for tensor in quantize_fp8(Constant(weight)))
    assert np.isfinite(values).all()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    # 3 mantissa bits: half a unit is 1/16 of a normal number; subnormals are 2^-9 apart; tiny rows become zero
    bound = np.maximum(np.abs(weight) / 16, scales * 2.0**-10) * 1.0001 + 2.0**-100
    assert (np.abs(values * scales - weight) <= bound).all()


def test_rounding_saturates() -> None:
    rounded = to_e4m3(np.array([448, 449, 464, 1e30, -1e30, np.float32(17), np.float32(19)], np.float32))
    np.testing.assert_array_equal(rounded.astype(np.float32), [448, 448, 448, 448, -448, 16, 20])  # ties to even


def test_a_row_of_zeros_has_scale_one() -> None:
    weight = random(3, 16)
    weight[1] = 0
    values, scales = quantize_fp8(Constant(weight))
    assert scales.numpy()[1] == 1
    assert not values.numpy()[1].astype(np.float32).any()


@pytest.mark.parametrize("transposed", [False, True])
def test_any_tile_equals_that_part_of_the_whole(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4convert.quantization.fp8.TILE_ELEMENTS", 20)  # rows are scanned in pieces
    weight = random(2, 7, 40)
    constant = Transposed(Constant(np.ascontiguousarray(weight.swapaxes(1, 2)))) if transposed else Constant(weight)
    whole = [tensor.numpy() for tensor in quantize_fp8(Constant(weight))]
    for rows, cols in ((slice(0, 7), slice(0, 40)), (slice(0, 7), slice(11, 13)), (slice(3, 5), slice(39, 40))):
        values, scales = quantize_fp8(constant)
        got = values.tile(1, rows, cols)
        np.testing.assert_array_equal(got.view(np.uint8), whole[0][1][rows, cols].view(np.uint8))
        np.testing.assert_array_equal(scales.tile(1, rows, slice(0, 1)), whole[1][1][rows])
        np.testing.assert_array_equal(scales.tile(0, rows, slice(0, 1)), whole[1][0][rows])  # not the other matrix's


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    class Named(Constant):
        @property
        def sources(self) -> tuple[str, ...]:
            return ("experts.0.up_proj.weight", "experts.1.up_proj.weight")

    weight = random(4, 16)
    weight[3, 3] = bad
    for tensor in quantize_fp8(Named(weight)):
        with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight' \(or one of 1 tensors .*\) has 1 NaN"):
            tensor.numpy()


class Counted(Constant):
    """Counts the elements that are computed."""

    read = 0

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        self.read += (rows.stop - rows.start) * (cols.stop - cols.start)
        return super().tile(batch, rows, cols)


def test_threads_that_take_turns_read_their_rows_once() -> None:
    weight = Counted(random(8, 40))
    values, scales = quantize_fp8(weight)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for tensor, width in ((values, 40), (scales, 1)):
            for thread, rows in ((first, slice(0, 4)), (second, slice(4, 8))):
                thread.submit(tensor.tile, 0, rows, slice(0, width)).result()
    assert weight.read == weight.size


def test_threads_that_take_columns_share_the_rows_scales() -> None:
    weight = Counted(random(8, 40))
    values, _ = quantize_fp8(weight)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: values.tile(0, slice(0, 8), slice(start, start + 5)), range(0, 40, 5)))
    assert weight.read == 2 * weight.size  # once for the scales, once for the values
