"""Streams that go back, and copies of streams, against what transformers says of the tokens that are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession
from tests.artifacts import KV_CACHES
from tests.runtime.following import Logits, begun, check, follow, plans, text

C = 8  # chunk size of the fixture
ROOM = 60
#: Artifacts of ``sessions``: the canonical graph in each form of the cache, and what the targets make of it.
PORTABLE = KV_CACHES
LOWERED = ("cpu growing", "cpu static", "cpu windowed", "in place")
ALL = (*PORTABLE, *LOWERED)
KEEPS_ALL = ("growing", "cpu growing")


@pytest.fixture(scope="module")
def sessions(
    artifacts: dict[str, Path], scout_layout: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, OrtSession]:
    folder = tmp_path_factory.mktemp("lowered")
    paths = dict(artifacts)
    for name in LOWERED:
        paths[name] = folder / name
        lowering: dict[str, Any] = {"target": "cpu", "kv_cache": name.removeprefix("cpu ")}
        if name == "in place":
            lowering = {"target": "tensorrt-rtx", "compute": "float32"}
        convert(ConvertOptions(checkpoint=scout_layout, output=paths[name], recipe="none", **lowering))
    return {name: OrtSession.open(path, max_length=ROOM, threads=1) for name, path in paths.items()}


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize(("fed", "back"), [(21, 3), (21, 5), (21, 6), (21, 13), (24, 1), (17, 17), (16, 8)])
def test_what_comes_after_a_rollback_is_as_if_the_tokens_had_never_been(
    form: str, fed: int, back: int, sessions: dict[str, OrtSession], reference: Logits
) -> None:
    """Within a chunk of 8, to its beginning, across one boundary and two, from a boundary, and to nothing."""
    follower = begun(sessions[form], 1)
    follower.step(text(fed)[None])
    follower.rollback(back)
    follower.step(text(1, seed=2)[None])
    follower.step(text(11, seed=3)[None])
    check([follower], reference)


@pytest.mark.parametrize("form", ALL)
def test_each_row_goes_back_on_its_own(form: str, sessions: dict[str, OrtSession], reference: Logits) -> None:
    follower = begun(sessions[form], 4)
    mask = np.ones((4, 22), np.int64)
    mask[1, :5] = mask[2, 3:9] = mask[3, 1:] = 0
    follower.step(np.stack([text(22, seed) for seed in range(4)]), mask)
    for number, amounts in enumerate(([0, 4, 9, 1], [7, 0, 0, 0], [1, 2, 3, 1], [14, 0, 1, 2])):
        follower.rollback(amounts)
        follower.step(np.stack([text(3, seed=10 * number + row) for row in range(4)]))
    check([follower], reference)


@pytest.mark.parametrize("form", ALL)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), seed=st.integers(0, 3))
def test_any_steps_rollbacks_and_forks(
    form: str, plan: list[tuple[str, Any]], seed: int, sessions: dict[str, OrtSession], reference: Logits
) -> None:
    check(follow(begun(sessions[form], 2), plan, seed, ROOM), reference)
