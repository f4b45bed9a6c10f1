from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from l4convert.checkpoint.combiners import InterleavedHalves, Transposed
from l4convert.checkpoint.lazy import Constant, LazyTensor
from l4convert.checkpoint.safetensors_file import open_safetensors
from l4convert.errors import InputError
from l4convert.quantization.int4 import BLOCK_SIZES, SCALE_RULES, int4_blocks, quantize_int4


def dequantized(values: np.ndarray, scales: np.ndarray, block_size: int) -> np.ndarray:
    return values.astype(np.float32) * np.repeat(scales, block_size, axis=-1)[..., : values.shape[-1]]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(blocks: np.ndarray, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    error: np.ndarray = ((blocks.astype(np.float64) - values * scales[..., None].astype(np.float64)) ** 2).sum(-1)
    return error


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_absmax_is_the_textbook_formula(block_size: int) -> None:
    blocks = random(5, 3, block_size)
    values, scales = int4_blocks(blocks, "absmax")
    np.testing.assert_array_equal(scales, np.abs(blocks).max(-1) / np.float32(7))
    np.testing.assert_array_equal(values, np.rint(blocks / scales[..., None]))
    assert np.abs(values).max() == 7


SPREADS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(3, shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("spread", SPREADS)
def test_lse_is_near_the_best_of_a_dense_search(block_size: int, spread: str) -> None:
    blocks = SPREADS[spread](np.random.default_rng(1), (1, 400, block_size)).astype(np.float32)
    found = squared_error(blocks, *int4_blocks(blocks, "lse"))
    best = least_squared_error(blocks)
    assert (found >= best * 0.999).all()  # the search really is a bound
    # measured: 0.3 % at most for what weights look like, and 1.2 % for blocks without tails
    assert found.sum() <= (1.02 if spread == "uniform" else 1.005) * best.sum()
    absmax = squared_error(blocks, *int4_blocks(blocks, "absmax"))
    assert (found <= absmax * 1.0001).all()
    assert found.sum() <= (0.85 if spread == "uniform" else 0.75) * absmax.sum()


def least_squared_error(blocks: np.ndarray) -> np.ndarray:
    """Of every block, over 1100 scales in float64, each replaced by the best one for the values that it rounds to."""
    blocks = blocks.astype(np.float64)
    largest = np.abs(blocks).max(-1, keepdims=True)
    best = np.full(blocks.shape[:-1], np.inf)
    for inverse in np.concatenate([np.arange(3, 14, 0.02), np.arange(-14, -3, 0.02)]):
        values = np.clip(np.rint(blocks / largest * inverse), -8, 7)
        refit = (blocks * values).sum(-1) / (values**2).sum(-1)
        best = np.minimum(best, squared_error(blocks, values, refit))
    return best


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_lse_of_trained_weights_is_near_the_best_of_a_dense_search(block_size: int, nano: Path) -> None:
    weights = open_safetensors(nano / "model.safetensors")
    experts = weights["model.layers.1.feed_forward.experts.gate_up_proj"].numpy()  # [E, K, N]
    matrix = np.ascontiguousarray(experts.swapaxes(1, 2), np.float32)
    blocks = matrix.reshape(1, -1, block_size)[:, ::37]
    found = squared_error(blocks, *int4_blocks(blocks, "lse"))
    assert found.sum() <= 1.005 * least_squared_error(blocks).sum()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("ends", [(-8, 7), (-7, 8), (-7, 7)])
def test_lse_returns_weights_that_were_quantized_before(block_size: int, ends: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    original = rng.integers(ends[0], ends[1] + 1, (16, 5, block_size))
    original[..., 1] = ends[0] if ends[0] == -8 else ends[1]
    steps = 2.0 ** rng.integers(-90, 100, (16, 5, 1)) * rng.integers(128, 256, (16, 5, 1))  # as BF16 scales
    blocks = (original * steps).astype(np.float32)
    values, scales = int4_blocks(blocks, "lse")
    np.testing.assert_array_equal(values * scales[..., None], blocks)


def test_lse_uses_the_whole_grid_through_negative_scales() -> None:
    block = np.zeros((1, 1, 32), np.float32)
    block[0, 0, :9] = np.arange(9)  # 8 is representable only as -8 times -1
    values, scales = int4_blocks(block, "lse")
    assert scales[0, 0] == -1
    np.testing.assert_array_equal(values * scales[..., None], block)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_blocks_on_the_grid_keep_their_values(rule: str) -> None:
    original = np.random.default_rng(2).integers(-7, 8, (4, 6, 32))
    original[..., 0] = 7
    values, scales = int4_blocks((original * 0.25).astype(np.float32), rule)
    np.testing.assert_array_equal(values * np.sign(scales)[..., None], original)
    np.testing.assert_allclose(np.abs(scales), 0.25, rtol=3e-7)


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_zero_and_negligible_blocks_are_zeros_with_scale_one(rule: str) -> None:
    blocks = random(2, 3, 32)
    blocks[0, 1], blocks[1, 2], blocks[1, 0] = 0, 1e-42, -0.0
    values, scales = int4_blocks(blocks, rule)
    for place in ((0, 1), (1, 2), (1, 0)):
        assert scales[place] == 1
        assert not values[place].any()
    assert np.isfinite(scales).all()
    assert (scales[0, 0], scales[1, 1]) != (1, 1)


@pytest.mark.parametrize("rule", SCALE_RULES)
@settings(max_examples=60)
@given(
    blocks=hnp.arrays(
        np.float32,
        (2, 2, 32),
        elements=st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_any_finite_block_stays_within_half_a_step(rule: str, blocks: np.ndarray) -> None:
    before = blocks.copy()
    values, scales = int4_blocks(blocks, rule)
    np.testing.assert_array_equal(blocks, before)  # the argument is not touched
    assert np.isfinite(scales).all()
    assert (scales != 0).all()
    assert values.min() >= -8
    assert values.max() <= 7
    error = np.abs(blocks - values.astype(np.float64) * scales[..., None])
    largest = np.abs(blocks).max(-1, keepdims=True).astype(np.float64)
    # half a step of absmax; "lse" may trade its largest elements for the many, never by more than what it clips
    bound = largest / 14 if rule == "absmax" else largest * (1 - 7 / 10)
    assert (error <= bound * 1.0001 + 2.0**-99).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("cols", [1, 31, 32, 48, 100, 128])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_any_tile_equals_that_part_of_the_whole(rule: str, cols: int, dtype: type) -> None:
    weight = random(2, 7, cols).astype(dtype)
    values, scales = quantize_int4(Constant(weight), 32, rule)
    assert (values.dtype, scales.dtype) == (ir.DataType.INT4, ir.DataType.FLOAT)
    assert (values.dims, scales.dims) == ((2, 7, cols), (2, 7, -(-cols // 32)))
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, 0), (0, -cols % 32)))
    expected = [int4_blocks(matrix.reshape(7, -1, 32), rule) for matrix in padded]
    whole = np.stack([part[0].reshape(7, -1)[:, :cols] for part in expected])
    np.testing.assert_array_equal(values.numpy().astype(np.int8), whole)
    np.testing.assert_array_equal(scales.numpy(), np.stack([part[1] for part in expected]))
    for tile in ((slice(0, 7), slice(0, cols)), (slice(2, 5), slice(cols // 3, cols)), (slice(6, 7), slice(0, 1))):
        np.testing.assert_array_equal(values.tile(1, *tile).astype(np.int8), whole[1][tile])
    np.testing.assert_array_equal(scales.tile(1, slice(3, 4), slice(0, 1)), expected[1][1][3:4, 0:1])


def test_transposed_experts_are_quantized_along_the_contracted_axis() -> None:
    stored = random(3, 64, 10).astype(ml_dtypes.bfloat16)  # [E, K, N] as transformers keeps them
    values, scales = quantize_int4(Transposed(Constant(stored)), 32, "lse")
    expected = quantize_int4(Constant(np.ascontiguousarray(stored.swapaxes(1, 2))), 32, "lse")
    assert values.tobytes() == expected[0].tobytes()
    assert scales.tobytes() == expected[1].tobytes()


def test_bytes_do_not_depend_on_how_a_tensor_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Constant(random(2, 33, 160).astype(ml_dtypes.bfloat16))
    tensors = quantize_int4(weight, 32, "lse")
    whole = [tensor.tobytes() for tensor in tensors]
    monkeypatch.setattr("l4convert.quantization.int4._CHUNK", 1)
    monkeypatch.setattr("l4convert.quantization.int4.TILE_ELEMENTS", 160)
    tensors = quantize_int4(weight, 32, "lse")
    assert [b"".join(data for _, data in tensor.chunks(elements=160)) for tensor in tensors] == whole


def test_values_and_scales_of_a_tile_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []

    class Counted(Constant):
        def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
            reads.append((rows.start, rows.stop))
            return super().tile(batch, rows, cols)

    values, scales = quantize_int4(Counted(random(8, 64)), 32, "absmax")
    interleaved: list[LazyTensor] = [InterleavedHalves(values), InterleavedHalves(scales)]
    for tensor in interleaved:
        tensor.tile(0, slice(0, 4), slice(0, tensor.dims[1]))
    assert reads == [(0, 2), (4, 6)]  # gate rows, up rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    class Named(Constant):
        @property
        def sources(self) -> tuple[str, ...]:
            return ("model.layers.0.q_proj.weight",)

    weight = random(4, 64)
    weight[2, 5:8] = bad
    for quantized in quantize_int4(Named(weight), 32, "lse"):
        with pytest.raises(InputError, match=r"tensor 'model\.layers\.0\.q_proj\.weight' has 3 NaN or infinite values"):
            quantized.tobytes()


@pytest.mark.parametrize(("block_size", "rule"), [(16, "lse"), (32, "best")])
def test_unknown_schemes_are_refused(block_size: int, rule: str) -> None:
    with pytest.raises(ValueError, match="unknown INT4 scheme"):
        quantize_int4(Constant(random(2, 32)), block_size, rule)
