"""Scales of caches: the maximum fits, zeros and NaN are told, clipping helps few codes, and memory is bounded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from l4convert.quantization.kv import KvDtype, KvScheme
from l4convert.quantization.kv_scales import PLACES, SAMPLE_TOKENS, Rotation, Spread, round_trip, sampled_tokens

STORED = {"fp8": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8, "int4": TensorProto.INT4}


def spread_of(rows: np.ndarray) -> Spread:
    spread = Spread.empty(rows.shape[0], rows.shape[2])
    spread.add(rows, sampled_tokens(rows.shape[1]))
    return spread


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_round_trip_is_that_of_onnx(dtype: KvDtype) -> None:
    rows, scale = 4 * noise(2, 50, 8), np.float32(0.0625)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["code"], output_dtype=STORED[dtype], saturate=1)
        if dtype == "fp8"
        else helper.make_node("QuantizeLinear", ["x", "scale"], ["code"], output_dtype=STORED[dtype]),
        helper.make_node("DequantizeLinear", ["code", "scale"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:2], ends[2:]), opset_imports=[helper.make_opsetid("", 23)]
    )
    (expected,) = ReferenceEvaluator(model).run(None, {"x": rows, "scale": scale})
    np.testing.assert_array_equal(round_trip(rows, np.asarray(scale), dtype), expected)


@pytest.mark.parametrize(("dtype", "highest"), [("fp8", 224), ("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_no_scale_exceeds_what_the_maximum_needs(dtype: KvDtype, highest: float, granularity: str) -> None:
    rows = noise(3, 200, 16) * np.linspace(0.1, 5, 16, dtype=np.float32)
    scales = spread_of(rows).scales(KvScheme(dtype, granularity))
    assert scales.shape == (1, 3, 1, 16)
    assert scales.dtype == np.float32
    needed = np.abs(rows).max(axis=(1, 2) if granularity == "head" else 1, keepdims=True)[None] / highest
    assert (scales <= needed * (1 + 2**-7)).all()
    assert (scales >= needed * 0.2).all()
    if dtype != "int4":
        assert (scales >= needed).all()
    if granularity == "head":
        assert (scales == scales[..., :1]).all()


def test_what_was_always_zero_gets_a_scale() -> None:
    rows = noise(2, 150, 8)
    rows[0, :, 3], rows[1] = 0, 0
    scales = spread_of(rows).scales(KvScheme("int8", "channel"))
    assert scales[0, 0, 0, 3] == scales[0, 0].max()
    assert (scales[0, 1] == 1).all()
    tiny = spread_of(np.full((1, 150, 4), 1e-42, np.float32)).scales(KvScheme("int8"))
    assert (tiny >= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("granularity", ["head", "channel"])
def test_a_rare_large_element_does_not_coarsen_four_bits(granularity: str) -> None:
    rows = noise(2, SAMPLE_TOKENS, 8)
    rows[:, 7] *= 3
    chosen = spread_of(rows).scales(KvScheme("int4", granularity))[0]
    axis = (1, 2) if granularity == "head" else 1
    largest = np.abs(rows).max(axis=axis, keepdims=True) / np.float32(7)

    def error(scale: np.ndarray) -> float:
        return float(((round_trip(rows, scale, "int4") - rows) ** 2).sum())

    assert error(chosen) < 0.8 * error(largest)
    assert (chosen < largest).any()


def test_the_sample_does_not_grow_with_the_text() -> None:
    spread, tokens = Spread.empty(1, 4), 20 * SAMPLE_TOKENS
    chosen = sampled_tokens(tokens)
    for start in range(0, tokens, 100):
        part = chosen[(chosen >= start) & (chosen < start + 100)] - start
        spread.add(noise(1, min(100, tokens - start), 4, seed=start), part)
    assert sum(sample.shape[1] for sample in spread.samples) == SAMPLE_TOKENS == len(chosen)


def test_nan_and_infinities_stay_visible() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        rows = noise(1, 30, 4)
        rows[0, 5, 2] = bad
        spread = Spread.empty(1, 4)
        spread.add(rows, sampled_tokens(30))
        spread.add(noise(1, 30, 4), sampled_tokens(30))
        assert not np.isfinite(spread.maxima[0, 2])
        assert np.isfinite(np.delete(spread.maxima, 2)).all()


def test_keys_are_seen_at_other_places_of_the_chunk() -> None:
    frequencies, chunk = np.array([1.0, 0.01]), 64
    raw = noise(2, 40, 4)
    places = np.arange(40)

    def at(where: np.ndarray) -> np.ndarray:
        turned = (raw[..., 0::2] + 1j * raw[..., 1::2]) * np.exp(1j * where[:, None] * frequencies)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(raw.shape)

    stored, rotation = at(places).astype(np.float32), Rotation(frequencies, chunk)
    np.testing.assert_allclose(rotation.moved(stored, places, 3), at((places + 24) % chunk), atol=1e-5)
    spread = Spread.empty(2, 4)
    spread.add_rotated(stored, np.arange(0, 40, 2), places, rotation)
    everywhere = max_over(at((places + turn * chunk // PLACES) % chunk) for turn in range(PLACES))
    np.testing.assert_allclose(spread.maxima, everywhere, rtol=1e-5)
    assert sum(sample.shape[1] for sample in spread.samples) == 20
    lengths = np.hypot(raw[..., 0::2], raw[..., 1::2]).max(axis=1)
    assert (spread.maxima.reshape(2, 2, 2) <= lengths[..., None] * (1 + 1e-5)).all()


def max_over(rows: object) -> np.ndarray:
    return np.max([np.abs(part).max(axis=1) for part in rows], axis=0)  # type: ignore[attr-defined]


def test_the_largest_e4m3_number_is_the_highest_code() -> None:
    assert KvScheme("fp8").format.highest == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
