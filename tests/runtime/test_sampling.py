from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers.generation.logits_process import TopPLogitsWarper

from l4convert.errors import CheckFailed, UsageError
from l4convert.runtime.sampling import Sampler, SamplingOptions, nucleus

# Far enough apart that no two have the same probability: which of those comes first would be anyone's choice.
STEPS = st.integers(-240, 240).map(lambda step: step / 8)
LOGITS = arrays(np.float32, st.integers(2, 40), elements=STEPS, unique=True)


@given(LOGITS)
def test_temperature_zero_is_argmax(logits: np.ndarray) -> None:
    assert Sampler()(logits) == torch.from_numpy(logits).argmax().item()


@given(LOGITS, st.floats(0.25, 4))
def test_without_top_p_the_probabilities_are_torchs_softmax(logits: np.ndarray, temperature: float) -> None:
    tokens, probabilities = nucleus(logits, temperature, 1.0)
    expected = (torch.from_numpy(logits).double() / temperature).softmax(-1).numpy()
    whole = np.zeros(len(logits))
    whole[tokens] = probabilities
    np.testing.assert_allclose(whole, expected, atol=1e-12)


@given(LOGITS, st.floats(0.05, 0.99))
@settings(max_examples=200)
def test_top_p_keeps_the_tokens_that_transformers_keeps(logits: np.ndarray, top_p: float) -> None:
    wide = torch.from_numpy(logits.astype(np.float64))
    mass = wide.softmax(-1).sort(descending=True).values.cumsum(-1)
    if (mass - top_p).abs().min() < 1e-9:
        return  # the two sum in opposite directions, so an exact tie is rounding's to decide
    kept = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), wide[None])[0].isfinite()
    tokens, probabilities = nucleus(logits, 1.0, top_p)
    assert set(tokens.tolist()) == set(kept.nonzero()[:, 0].tolist())
    assert probabilities.sum() == pytest.approx(1)


def test_samples_have_the_frequencies_of_their_probabilities() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3))
    drawn = np.bincount([sampler(np.log(probabilities)) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, probabilities, atol=0.03)


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 30))

    def run(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.95, seed=seed))
        return [sampler(row) for row in logits]

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_a_tiny_top_p_still_keeps_the_best_token() -> None:
    assert Sampler(SamplingOptions(temperature=1.0, top_p=1e-9))(np.array([0.0, 3.0, 1.0])) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(options)).replace("_", "-")):
        SamplingOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(value: float, temperature: float) -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        Sampler(SamplingOptions(temperature=temperature))(np.array([0.0, value, 1.0]))
