"""Runners that are right by construction, and ones that are wrong in one known way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np

from l4convert.progress import Task

VOCABULARY = 128
CHUNK = 8

_TABLE = np.random.default_rng(5).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)

Fault = Callable[["Fake", list[list[int]], np.ndarray], None]


def true_logits(ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] that depend on every token so far and on how far back each one is."""
    rows = []
    state = np.zeros(VOCABULARY, np.float32)
    for token in ids:
        state = 0.8 * state + _TABLE[token]
        rows.append(state)
    return np.array(rows, np.float32).reshape(-1, VOCABULARY)


class Fake:
    """Reference and runner in one.

    Args:
        fault: Spoils the logits [B, S, vocabulary] of a call in place; it is given the runner, each row's tokens so far
            (the call's included) and the logits.
    """

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.name = "fake"
        self.logits = true_logits

    def start(self, batch: int) -> FakeStream:
        return FakeStream(self, batch)

    def stream(self) -> FakeText:
        return FakeText(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FakeText:
    """A text that the fake is fed as a reference; it computes it anew at each step."""

    def __init__(self, fake: Fake) -> None:
        self._fake = fake
        self._ids = np.zeros(0, np.int64)

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._ids = np.concatenate([self._ids, ids])
        return self._fake.logits(self._ids)[-len(ids) :]


class FakeStream:
    def __init__(self, fake: Fake, batch: int) -> None:
        self._fake = fake
        self._rows: list[list[int]] = [[] for _ in range(batch)]

    def step(self, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        mask = np.ones_like(input_ids) if mask is None else mask
        # At padding there is garbage on purpose: nobody may look at it.
        logits = np.full((*input_ids.shape, VOCABULARY), np.nan, np.float32)
        for row, tokens in enumerate(self._rows):
            new = input_ids[row][mask[row] == 1].tolist()
            tokens.extend(new)
            logits[row, mask[row] == 1] = true_logits(np.array(tokens))[len(tokens) - len(new) :]
        if self._fake.fault is not None:
            self._fake.fault(self._fake, self._rows, logits)
        return logits


class Counter:
    """Progress that only adds up; of one task."""

    def __init__(self) -> None:
        self.done, self.total = 0.0, 0.0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "B") -> Iterator[Task]:
        self.total = total or 0.0
        yield self

    def advance(self, amount: float) -> None:
        self.done += amount

    def update(self, description: str) -> None: ...
