"""Streams that go back, and copies of streams, against what transformers says of the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4convert.parity.reference import TransformersReference
from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession, OrtStream
from tests.artifacts import KV_CACHES

C = 8  # chunk size of the fixture
ROOM = 60
#: Artifacts of ``sessions``: the canonical graph in each form of the cache, and what the targets make of it.
PORTABLE = KV_CACHES
LOWERED = ("cpu growing", "cpu static", "cpu windowed", "in place")
ALL = (*PORTABLE, *LOWERED)
KEEPS_ALL = ("growing", "cpu growing")

Logits = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def reference(scout_layout: Path) -> Logits:
    """Logits of a whole text by transformers; texts come again, so they are kept."""
    model, known = TransformersReference(scout_layout), {}

    def logits(ids: np.ndarray) -> np.ndarray:
        key = ids.tobytes()
        if key not in known:
            known[key] = model.logits(ids)
        return known[key]

    return logits


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


class Follower:
    """A stream, the tokens it should have, and the logits it gave for each of them."""

    def __init__(self, stream: OrtStream, rows: list[list[tuple[int, np.ndarray]]]) -> None:
        self.stream = stream
        self.rows = rows

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        logits = self.stream.step(ids, mask)
        for row, column in np.argwhere(np.ones_like(ids) if mask is None else mask):
            self.rows[row].append((int(ids[row, column]), logits[row, column]))

    def rollback(self, tokens: int | list[int]) -> None:
        self.stream.rollback(tokens if isinstance(tokens, int) else np.array(tokens))
        amounts = [tokens] * len(self.rows) if isinstance(tokens, int) else tokens
        self.rows = [row[: len(row) - amount] for row, amount in zip(self.rows, amounts, strict=True)]

    def fork(self, copies: int | None = None) -> Follower:
        rows = self.rows * (copies or 1)
        return Follower(self.stream.fork(copies), [list(row) for row in rows])

    def check(self, reference: Logits) -> None:
        assert self.stream.lengths.tolist() == [len(row) for row in self.rows]
        for row in self.rows:
            if not row:
                continue
            expected = reference(np.array([token for token, _ in row]))
            logits = np.stack([vector for _, vector in row])
            assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def begun(session: OrtSession, batch: int) -> Follower:
    return Follower(session.start(batch), [[] for _ in range(batch)])


def text(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 128, length)


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
    follower.check(reference)


@pytest.mark.parametrize("form", ALL)
def test_each_row_goes_back_on_its_own(form: str, sessions: dict[str, OrtSession], reference: Logits) -> None:
    follower = begun(sessions[form], 4)
    mask = np.ones((4, 22), np.int64)
    mask[1, :5] = mask[2, 3:9] = mask[3, 1:] = 0
    follower.step(np.stack([text(22, seed) for seed in range(4)]), mask)
    for number, amounts in enumerate(([0, 4, 9, 1], [7, 0, 0, 0], [1, 2, 3, 1], [14, 0, 1, 2])):
        follower.rollback(amounts)
        follower.step(np.stack([text(3, seed=10 * number + row) for row in range(4)]))
    follower.check(reference)


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """What happens to a batch of two: steps with any padding, rollbacks of any rows, forks."""
    actions = []
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(["step", "step", "rollback", "fork"]))
        width = draw(st.integers(1, 11))
        rows = st.lists(st.sampled_from([1, 1, 0]), min_size=width, max_size=width)
        back = st.one_of(st.just(0), st.integers(0, 20))
        actions.append((kind, draw(st.lists(rows if kind == "step" else back, min_size=2, max_size=2))))
    return actions


@pytest.mark.parametrize("form", ALL)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), seed=st.integers(0, 3))
def test_any_steps_rollbacks_and_forks(
    form: str, plan: list[tuple[str, Any]], seed: int, sessions: dict[str, OrtSession], reference: Logits
) -> None:
    rng = np.random.default_rng(seed)
    followers = [begun(sessions[form], 2)]
    for kind, what in plan:
        follower = followers[rng.integers(len(followers))]
        if kind == "step":
            mask = np.array(what)
            if (follower.stream.lengths + mask.sum(axis=1)).max() < ROOM:
                follower.step(rng.integers(3, 128, mask.shape), mask)
        elif kind == "rollback":
            follower.rollback(np.minimum(what, follower.stream.lengths).tolist())
        else:
            followers.append(follower.fork())
    for follower in followers:
        if follower.stream.lengths.max() < ROOM:
            follower.step(rng.integers(3, 128, (2, 1)))
        follower.check(reference)
