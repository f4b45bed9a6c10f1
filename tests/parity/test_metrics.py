from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from l4convert.errors import CheckFailed
from l4convert.parity.metrics import NO_TARGET, Comparison, Metrics

SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 9))
LOGITS = SHAPES.flatmap(lambda s: arrays(np.float32, s, elements=st.floats(-50, 50, width=32)))
PAIRS = SHAPES.flatmap(
    lambda s: st.tuples(*[arrays(np.float32, s, elements=st.floats(-50, 50, width=32)) for _ in range(2)])
)


def compare(reference: np.ndarray, artifact: np.ndarray, targets: np.ndarray | None = None) -> Metrics:
    comparison = Comparison()
    comparison.update(reference, artifact, targets)
    return comparison.result()


@given(PAIRS)
@settings(max_examples=200)
def test_measures_are_those_of_torch(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, artifact = (torch.from_numpy(logits).double() for logits in pair)
    targets = np.arange(len(pair[0])) % pair[0].shape[1]
    metrics = compare(*pair, targets)
    log_p, log_q = reference.log_softmax(-1), artifact.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert metrics.mean_kl == pytest.approx(kl.mean().item(), abs=1e-12)
    assert metrics.max_kl == pytest.approx(kl.max().item(), abs=1e-12)
    assert metrics.p50_kl == pytest.approx(kl.quantile(0.5).item(), abs=1e-12)
    assert metrics.p99_kl == pytest.approx(kl.quantile(0.99).item(), abs=1e-12)
    difference = (artifact - reference).abs().max().item()
    assert metrics.max_abs_logit == difference
    largest = reference.abs().max().item()
    assert metrics.max_rel_logit == (difference / largest if largest else math.inf if difference else 0.0)
    assert metrics.top1 == np.mean(pair[0].argmax(-1) == pair[1].argmax(-1))
    labels = torch.from_numpy(targets)
    for logits, ppl in ((reference, metrics.ppl_reference), (artifact, metrics.ppl_artifact)):
        assert ppl == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).exp().item())
    assert (metrics.tokens, metrics.scored) == (len(pair[0]), len(pair[0]))


@given(LOGITS)
def test_identical_logits_differ_by_exactly_nothing(logits: np.ndarray) -> None:
    metrics = compare(logits, logits.copy())
    assert metrics.max_abs_logit == metrics.max_rel_logit == metrics.max_kl == 0
    assert metrics.top1 == 1
    assert not metrics.problems()


@given(PAIRS)
def test_kl_is_never_negative(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert compare(*pair).p50_kl >= 0


@given(PAIRS, st.floats(-20, 20))
def test_a_constant_added_to_all_logits_changes_no_probability(
    pair: tuple[np.ndarray, np.ndarray], constant: float
) -> None:
    shifted = compare(pair[0], pair[1].astype(np.float64) + constant)
    assert shifted.mean_kl == pytest.approx(compare(*pair).mean_kl, abs=1e-9)


@given(PAIRS, st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans(), st.data())
def test_nothing_passes_with_a_value_that_is_not_finite(
    pair: tuple[np.ndarray, np.ndarray], value: float, in_reference: bool, data: st.DataObject
) -> None:
    reference, artifact = (logits.copy() for logits in pair)
    row = data.draw(st.integers(0, len(reference) - 1))
    column = data.draw(st.integers(0, reference.shape[1] - 1))
    (reference if in_reference else artifact)[row, column] = value
    metrics = compare(reference, artifact)
    assert metrics.problems()
    assert (metrics.non_finite_reference if in_reference else metrics.non_finite) == 1
    assert metrics.tokens == len(reference) - 1


def test_the_same_infinity_on_both_sides_is_no_agreement() -> None:
    logits = np.array([[0.0, np.inf], [1.0, 2.0]], np.float32)
    assert compare(logits, logits).problems()


def test_nothing_compared_is_a_problem() -> None:
    assert Comparison().result().problems() == ("no tokens were compared",)
    assert compare(np.zeros((0, 4)), np.zeros((0, 4))).problems() == ("no tokens were compared",)


@pytest.mark.parametrize(
    ("one", "other"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,)), ((3, 0), (3, 0)), ((1, 3, 4), (1, 3, 4))]
)
def test_shapes_that_differ_or_hold_nothing_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(CheckFailed, match="shape"):
        Comparison().update(np.zeros(one), np.zeros(other))


def test_an_all_zero_reference_does_not_hide_a_difference() -> None:
    metrics = compare(np.zeros((1, 3)), np.ones((1, 3)))
    assert metrics.max_rel_logit == math.inf
    assert metrics.problems()


def test_a_perplexity_that_overflows_is_a_problem() -> None:
    logits = np.array([[0.0, 2000.0]])
    metrics = compare(logits, logits, np.array([0]))
    assert metrics.ppl_reference == math.inf
    assert metrics.problems() == ("a measure is not finite",)


def test_positions_without_a_next_token_are_not_scored() -> None:
    logits = np.log([[0.5, 0.5], [0.1, 0.9]])
    metrics = compare(logits, logits, np.array([1, NO_TARGET]))
    assert (metrics.tokens, metrics.scored) == (2, 1)
    assert metrics.ppl_reference == pytest.approx(2)


@given(PAIRS, st.integers(0, 12))
def test_pieces_add_up(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    targets = np.zeros(len(pair[0]), np.int64)
    comparison = Comparison()
    comparison.update(pair[0][:cut], pair[1][:cut], targets[:cut])
    comparison.update(pair[0][cut:], pair[1][cut:], targets[cut:])
    whole, parts = compare(*pair, targets).to_json(), comparison.result().to_json()
    assert parts == pytest.approx(whole, nan_ok=True)


def test_work_is_done_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    reference, artifact = random.normal(size=(2, 50, 8))
    whole = compare(reference, artifact).to_json()
    monkeypatch.setattr("l4convert.parity.metrics._BLOCK_ELEMENTS", 24)
    assert compare(reference, artifact).to_json() == pytest.approx(whole)


def test_json_has_no_nan() -> None:
    values = Comparison().result().to_json()
    assert values["mean_kl"] is None
    assert values["tokens"] == 0
    json.dumps(values, allow_nan=False)
