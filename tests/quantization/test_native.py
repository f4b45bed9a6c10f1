"""The compiled kernels against the NumPy definitions, byte for byte, at every instruction set of this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from l4convert.checkpoint.combiners import InterleavedHalves, transposed
from l4convert.checkpoint.lazy import Constant, LazyTensor, pack_rows
from l4convert.errors import InputError
from l4convert.quantization import native
from l4convert.quantization.fp8 import quantize_fp8, row_scales, to_e4m3
from l4convert.quantization.int4 import BLOCK_SIZES, SCALE_RULES, quantize_int4, quantize_rows
from l4convert.quantization.layouts import matmul_nbits, qmoe, reorder_nibbles

needs_library = pytest.mark.skipif(not native.AVAILABLE, reason="the package was built without a compiler")

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]
FINITE = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_infinity=False)


def weights(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    match kind:
        case "heavy-tailed":
            values = rng.standard_t(3, shape)
        case "ties":  # halves of what absmax divides by, and equal magnitudes of both signs
            values = rng.integers(-14, 15, shape) / 2
        case "sparse":  # with blocks of zeros, of both signs
            values = rng.standard_normal(shape) * (rng.random(shape) < 0.02)
        case "tiny":  # around the limit below which a block is stored as zeros, and subnormal
            values = rng.standard_normal(shape) * 2.0 ** rng.integers(-149, -95, (shape[0], 1))
        case _:
            values = rng.standard_normal(shape) * 2.0 ** rng.integers(-90, 120, (shape[0], 1))
    return values.astype(np.float32)


def in_order(weight: np.ndarray, order: str) -> np.ndarray:
    """The same matrix: contiguous along K, along N, or a part of a larger one at an odd address."""
    if order == "K":
        return np.ascontiguousarray(weight)
    if order == "N":
        return np.ascontiguousarray(weight.T).T
    rows, cols = weight.shape
    buffer = np.zeros(rows * (cols + 3) * weight.itemsize + 1, np.uint8)
    larger = np.ndarray((rows, cols + 3), weight.dtype, buffer, offset=1)
    larger[:, 2:-1] = weight
    return larger[:, 2:-1]


@needs_library
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(max_examples=60)
@given(data=st.data())
def test_int4_equals_its_definition(rule: str, level: int, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300)))
    kind = data.draw(st.sampled_from(["heavy-tailed", "ties", "sparse", "tiny", "any"]))
    weight = weights(kind, shape, data.draw(st.integers(0, 2**31)))
    with np.errstate(over="ignore"):
        weight = weight.astype(data.draw(st.sampled_from(DTYPES)))
    weight = np.where(np.isfinite(weight), weight, 1).astype(weight.dtype)  # what was too large for FP16
    weight = in_order(weight, data.draw(st.sampled_from(["K", "N", "part"])))
    check_int4(weight, data.draw(st.sampled_from(BLOCK_SIZES)), rule, level)


@needs_library
@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(max_examples=60)
@given(weight=hnp.arrays(np.float32, (2, 64), elements=FINITE))
def test_int4_equals_its_definition_on_odd_numbers(rule: str, weight: np.ndarray) -> None:
    check_int4(weight, 32, rule, 2)


def check_int4(weight: np.ndarray, block_size: int, rule: str, level: int) -> None:
    values, scales = quantize_rows(weight, block_size, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_LEVEL", level)
        packed = native.int4(weight, block_size, rule, packed=True)
        single = native.int4(weight, block_size, rule, packed=False)
    assert packed is not None
    assert single is not None
    for got in (packed[1], single[1]):
        np.testing.assert_array_equal(got.view(np.uint32), scales.view(np.uint32))
    np.testing.assert_array_equal(packed[0], pack_rows(values))
    np.testing.assert_array_equal(single[0], values[:, : weight.shape[1]].view(np.uint8) & 0x0F)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (39, 99), (33, 64)])
def test_int4_notices_any_value_that_is_not_finite(dtype: type, bad: float, place: tuple[int, int]) -> None:
    weight = weights("heavy-tailed", (40, 100), 0).astype(dtype)
    weight[place] = bad
    for order in ("K", "N", "part"):
        assert native.int4(in_order(weight, order), 32, "absmax", packed=True) is None


@needs_library
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("order", ["K", "N", "part"])
def test_fp8_equals_its_definition(order: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LEVEL", level)
    bits = np.arange(2**16, dtype=np.uint16)
    every_bf16 = bits[bits & 0x7FFF < 0x7F80].view(ml_dtypes.bfloat16).reshape(255, -1)
    near_ties = np.nextafter(np.outer([1, -1], np.arange(0.0, 480, 0.0009765625)), 0, dtype=np.float32)
    for weight in (every_bf16, near_ties, weights("any", (37, 101), 0).astype(np.float32)):
        stored = in_order(weight, order)
        magnitude = np.abs(weight.astype(np.float32)).max(axis=1)
        np.testing.assert_array_equal(native.magnitudes(stored), magnitude)
        for scales in (row_scales(magnitude), np.ones_like(magnitude)):
            expected = to_e4m3(weight.astype(np.float32) / scales[:, None])
            np.testing.assert_array_equal(native.fp8(stored, scales).view(np.uint8), expected.view(np.uint8))


@needs_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", ["K", "N"])
def test_magnitudes_show_what_is_not_finite(order: str, bad: float) -> None:
    weight = weights("heavy-tailed", (5, 33), 0)
    weight[3, 32] = bad
    finite = np.isfinite(native.magnitudes(in_order(weight, order)))
    np.testing.assert_array_equal(finite, [True, True, True, False, True])


def quantized(weight: LazyTensor) -> list[LazyTensor]:
    """The tensors that the targets store for an expert weight [E, K, N], and for a matrix."""
    values, scales = quantize_int4(transposed(weight), 64, "lse")
    matrix = quantize_int4(Constant(weight.tile(0, slice(0, 96), slice(0, 40))), 32, "absmax")
    fp8 = quantize_fp8(transposed(weight))
    tensors = [qmoe(values), qmoe(InterleavedHalves(values)), transposed(values), scales, InterleavedHalves(scales)]
    return [*tensors, matmul_nbits(matrix[0], 32), matrix[0], matrix[1], transposed(fp8[0]), fp8[1]]


def test_without_the_library_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Constant(weights("heavy-tailed", (192, 40), 0).astype(ml_dtypes.bfloat16).reshape(2, 96, 40))
    before = [tensor.tobytes() for tensor in quantized(weight)]
    monkeypatch.setattr(native, "AVAILABLE", False)
    monkeypatch.setattr(native, "_library", None)
    assert [tensor.tobytes() for tensor in quantized(weight)] == before


def test_without_the_library_broken_weights_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "AVAILABLE", False)
    weight = Constant(np.full((2, 32), np.nan, np.float32))
    for tensor in (*quantize_int4(weight, 32, "lse"), *quantize_fp8(weight)):
        with pytest.raises(InputError, match="64 NaN or infinite"):
            tensor.tobytes()


def test_threads_do_not_disturb_each_other() -> None:
    weight = Constant(weights("heavy-tailed", (256, 120), 0).astype(ml_dtypes.bfloat16).reshape(2, 128, 120))
    tensors = quantized(weight)
    alone = [tensor.tobytes() for tensor in tensors]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda tensor: tensor.tobytes(), tensors * 8))
    assert together == alone * 8


@needs_library
def test_codes_are_reordered_as_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    packed, order = rng.integers(0, 256, (7, 96), np.uint8), rng.permutation(64).tolist()
    result = reorder_nibbles(packed, 64, order)
    monkeypatch.setattr(native, "AVAILABLE", False)
    np.testing.assert_array_equal(result, reorder_nibbles(packed, 64, order))
    assert not np.array_equal(result, packed)
    for wrong, places in ((packed[:, :40], order), (packed, [*order[:-1], 64]), (packed, order[:-1])):
        with pytest.raises(ValueError, match="not whole groups of 64 codes, or no order of them"):
            native.reorder(wrong, places)
