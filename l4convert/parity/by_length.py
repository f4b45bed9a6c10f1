"""The measures by context length: what a position far from the beginning costs, which a mean over a text hides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from l4convert.parity.metrics import Comparison, Measured, Metrics

FIRST_EDGE = 256
GROWTH = 4


@dataclass(frozen=True)
class LengthRow:
    """The measures at the positions from ``start`` to before ``stop`` of all windows; 0 is a window's first token."""

    start: int
    stop: int
    metrics: Metrics

    def to_json(self) -> dict[str, Any]:
        """Plain values; the bounds are called ``from`` and ``to``."""
        return {"from": self.start, "to": self.stop, **self.metrics.to_json()}


def length_edges(window: int) -> tuple[int, ...]:
    """Where the ranges of positions begin and end: 0, 256, 1024, 4096, ..., and last ``window`` (at least 1)."""
    edges, edge = [0], FIRST_EDGE
    while edge < window:
        edges.append(edge)
        edge *= GROWTH
    return (*edges, window)


class ByLength:
    """Accumulates a comparison for each range of positions.

    Args:
        window: Tokens of the longest window.
    """

    def __init__(self, window: int) -> None:
        edges = length_edges(window)
        self._parts = [(slice(*ends), Comparison()) for ends in pairwise(edges)]

    def add(self, start: int, measured: Measured) -> None:
        """Take in what was measured at consecutive tokens, the first of them at position ``start`` of its window."""
        for places, comparison in self._parts:
            part = measured[max(places.start - start, 0) : max(places.stop - start, 0)]
            if len(part):
                comparison.add(part)

    def rows(self) -> tuple[LengthRow, ...]:
        """What the tokens so far amount to; ranges without a token are left out."""
        found = ((places, comparison.result()) for places, comparison in self._parts)
        return tuple(LengthRow(places.start, places.stop, metrics) for places, metrics in found if has_content(metrics))


def has_content(metrics: Metrics) -> bool:
    """Whether any token was looked at, be it one whose logits were not finite."""
    return metrics.tokens + metrics.non_finite + metrics.non_finite_reference > 0


class TextComparison:
    """A whole text's comparison and the same by length, from logits as they come.

    Args:
        window: Tokens of the longest window.
    """

    def __init__(self, window: int) -> None:
        self.whole = Comparison()
        self.by_length = ByLength(window)

    def add(self, start: int, measured: Iterable[Measured]) -> None:
        """Take in consecutive tokens of a window, block by block, the first one at position ``start``."""
        for block, at in _places(start, measured):
            self.whole.add(block)
            self.by_length.add(at, block)


def _places(start: int, blocks: Iterable[Measured]) -> Iterator[tuple[Measured, int]]:
    for block in blocks:
        yield block, start
        start += len(block)
