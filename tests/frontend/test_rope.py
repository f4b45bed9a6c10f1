from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.config import RopeScaling
from l4convert.frontend.rope import inverse_frequencies, rotary_tables
from tests.shapes import SCOUT


def _transformers_frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    config = Llama4TextConfig(head_dim=head_dim, rope_parameters=rope, num_hidden_layers=1)
    return np.asarray(Llama4TextRotaryEmbedding(config).inv_freq.numpy())


@given(
    theta=st.floats(1e3, 1e7),
    half=st.integers(2, 64),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    ratio=st.one_of(st.just(1.0), st.floats(1.5, 8.0)),
    original=st.integers(64, 65536),
)
def test_scaled_frequencies_equal_transformers(
    theta: float, half: int, factor: float, low: float, ratio: float, original: int
) -> None:
    scaling = RopeScaling(factor, low, low * ratio, original)
    config = dataclasses.replace(SCOUT, rope_theta=theta, head_dim=2 * half, rope_scaling=scaling)
    ours = inverse_frequencies(config)
    theirs = _transformers_frequencies(theta, 2 * half, scaling)
    turns = original * theirs / (2 * np.pi)  # a frequency on a threshold may fall on either side of it in float32
    clear = (np.abs(turns / low - 1) > 1e-4) & (np.abs(turns / (low * ratio) - 1) > 1e-4)
    np.testing.assert_allclose(ours[clear], theirs[clear], rtol=2e-5)


def test_unscaled_frequencies_equal_transformers() -> None:
    config = dataclasses.replace(SCOUT, rope_scaling=None)
    np.testing.assert_allclose(inverse_frequencies(config), _transformers_frequencies(500000.0, 128, None), rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 128, 8192])
def test_tables_are_rounded_once(rows: int) -> None:
    cos, sin = rotary_tables(SCOUT, rows)
    assert cos.shape == sin.shape == (rows, 64)
    assert cos.dtype == sin.dtype == np.float32
    angle = (rows - 1) * inverse_frequencies(SCOUT)
    np.testing.assert_allclose(cos[-1], np.cos(angle), atol=6e-8)
    np.testing.assert_allclose(sin[-1], np.sin(angle), atol=6e-8)
