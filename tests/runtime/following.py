"""Streams with a record of what they should have, to compare with what transformers says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

Logits = Callable[[list[list[int]]], list[np.ndarray]]
"""Logits [T, vocabulary] of each of some texts of T tokens, computed from their beginning."""


class Follower:
    """A stream, the tokens it should have, and the logits it gave for each of them."""

    def __init__(self, stream: Any, rows: list[list[tuple[int, np.ndarray]]]) -> None:
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


def check(followers: list[Follower], reference: Logits) -> None:
    """See that the streams have the tokens that they should have, and that every logit was as the reference's."""
    for follower in followers:
        assert follower.stream.lengths.tolist() == [len(row) for row in follower.rows]
    rows = [row for follower in followers for row in follower.rows if row]
    texts = reference([[token for token, _ in row] for row in rows]) if rows else []
    for row, expected in zip(rows, texts, strict=True):
        logits = np.stack([vector for _, vector in row])
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


def begun(session: Any, batch: int) -> Follower:
    return Follower(session.start(batch), [[] for _ in range(batch)])


def text(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 128, length)


@st.composite
def plans(draw: st.DrawFn, forks: bool = True) -> list[tuple[str, Any]]:
    """What happens to a batch of two: steps with any padding, rollbacks of any rows, forks."""
    actions = []
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(st.sampled_from(["step", "step", "rollback", "fork" if forks else "rollback"]))
        width = draw(st.integers(1, 11))
        rows = st.lists(st.sampled_from([1, 1, 0]), min_size=width, max_size=width)
        back = st.one_of(st.just(0), st.integers(0, 20))
        actions.append((kind, draw(st.lists(rows if kind == "step" else back, min_size=2, max_size=2))))
    return actions


def follow(first: Follower, plan: list[tuple[str, Any]], seed: int, room: int) -> list[Follower]:
    """Do what a plan says, each time to one of the streams there are; rows stay shorter than ``room``."""
    rng = np.random.default_rng(seed)
    followers = [first]
    for kind, what in plan:
        follower = followers[rng.integers(len(followers))]
        if kind == "step":
            mask = np.array(what)
            if (follower.stream.lengths + mask.sum(axis=1)).max() < room:
                follower.step(rng.integers(3, 128, mask.shape), mask)
        elif kind == "rollback":
            follower.rollback(np.minimum(what, follower.stream.lengths).tolist())
        else:
            followers.append(follower.fork())
    for follower in followers:
        if follower.stream.lengths.max() < room:
            follower.step(rng.integers(3, 128, (2, 1)))
    return followers
