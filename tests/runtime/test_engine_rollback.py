"""Engines' streams that go back: the same streams as of ONNX Runtime, on a device that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4convert.errors import UsageError
from tests.runtime.fake_device import CONTEXT, FakeDevice, opened
from tests.runtime.following import Logits, begun, check, follow, plans, text


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(forks=False), seed=st.integers(0, 3))
def test_any_steps_and_rollbacks(
    plan: list[tuple[str, Any]], seed: int, built: dict[str, Path], reference: Logits
) -> None:
    with opened(built["whole"]) as session:
        check(follow(begun(session, 2), plan, seed, CONTEXT), reference)


def test_going_back_within_a_chunk_runs_nothing(built: dict[str, Path], reference: Logits) -> None:
    device = FakeDevice()
    with opened(built["whole"], device) as session:
        follower = begun(session, 1)
        follower.step(text(14)[None])
        before = len(device.calls)
        follower.rollback(6)  # to the boundary at 8
        assert len(device.calls) == before
        follower.step(text(5, seed=2)[None])
        follower.rollback(7)  # to 6: the six tokens of the first chunk are fed again
        widths = [shapes["input_ids"][1] for _, shapes in device.calls[before + 1 :]]
        assert widths == [6]
        follower.step(text(3, seed=3)[None])
        check([follower], reference)


def test_decode_steps_after_a_rollback_see_the_right_tokens(built: dict[str, Path], reference: Logits) -> None:
    """The mask on the device is brought up to date by single elements, which must not survive a rollback."""
    with opened(built["whole"]) as session:
        follower = begun(session, 2)
        for amount in (0, 0, 1, 0, [1, 0], 2, 0):
            for seed in range(2):
                follower.step(text(2, seed)[:, None])
            follower.rollback(amount)
        follower.step(text(2)[:, None])
        check([follower], reference)


def test_an_engines_stream_cannot_be_copied(built: dict[str, Path]) -> None:
    with opened(built["whole"]) as session, pytest.raises(UsageError, match="one set of caches"):
        session.start(1).fork()


def test_a_stream_that_lost_its_caches_cannot_go_back(built: dict[str, Path]) -> None:
    with opened(built["whole"]) as session:
        old = session.start(1)
        old.step(np.full((1, 3), 5))
        session.start(1)
        with pytest.raises(ValueError, match="another batch"):
            old.rollback(1)
