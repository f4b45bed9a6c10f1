"""The ways of feeding the same tokens, as data: any of them must give the same logits (DESIGN, section 4).

They aim at what goes wrong in a chunked model: a call that starts or ends inside a chunk, that spans several chunks,
that ends exactly at a boundary, single tokens on both sides of one, and padding that shifts rows against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

# Single tokens are slow, so the token-by-token split has them on both sides of a few boundaries only.
_STEPS_AROUND = 4
_DECODED_BOUNDARIES = 5
_DECODED_AFTER_PADDING = 8


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Attributes:
        counts: How many new tokens each row of the batch gets; shorter rows are padded on the side ``padding``.
    """

    counts: tuple[int, ...]
    padding: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Split:
    """A way of feeding a batch of texts, call by call.

    Attributes:
        name: For reports; ``description``: why it is worth trying.
    """

    name: str
    description: str
    calls: tuple[Call, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row over all calls."""
        return tuple(sum(counts) for counts in zip(*(call.counts for call in self.calls), strict=True))

    @property
    def columns(self) -> int:
        """Positions a cache needs, padding included."""
        return sum(max(call.counts) for call in self.calls)


def one_call(length: int) -> Split:
    """The whole text at once: what the other splits are held against."""
    return _single("one call", "the whole window at once", [length])


def single_row_splits(length: int, chunk: int) -> tuple[Split, ...]:
    """Every way but :func:`one_call` of feeding one text of ``length`` tokens to a model with chunks of ``chunk``."""
    candidates = (
        _single("odd splits", "calls of irregular sizes, cut at odd places in chunks", _odd(length, chunk)),
        _single("whole chunks", "calls that end exactly at chunk boundaries", _equal(length, chunk)),
        _single("token by token", "single tokens on both sides of chunk boundaries", _decode(length, chunk)),
    )
    return tuple(split for split in candidates if len(split.calls) > 1)


def batch_splits(length: int, chunk: int) -> tuple[Split, ...]:
    """Batches of texts of unequal lengths, none over ``length``: a padded prompt, then single tokens for all."""
    if length < 12:
        return ()
    unit = max(4, min(chunk, length // 3))
    lengths = [unit + 3, 2 * unit + unit // 2, unit // 2]
    decoded = min(_DECODED_AFTER_PADDING, min(lengths) - 1)
    prompt = tuple(row - decoded for row in lengths)
    steps = (Call((1,) * len(lengths)),) * decoded
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    return tuple(
        Split(f"batch, {side} padding", f"{len(lengths)} texts of unequal lengths", (Call(prompt, side), *steps))
        for side in sides
    )


def boundaries(length: int, chunk: int) -> int:
    """How many chunk boundaries lie inside a text of ``length`` tokens."""
    return max(0, (length - 1) // chunk)


def _single(name: str, description: str, sizes: Sequence[int]) -> Split:
    return Split(name, description, tuple(Call((size,)) for size in sizes))


def _fill(length: int, sizes: Sequence[int]) -> list[int]:
    """Sizes repeated until they add up to ``length``, the last one cut."""
    taken: list[int] = []
    for size in cycle(sizes):
        left = length - sum(taken)
        if left <= 0:
            break
        taken.append(min(size, left))
    return taken


def _odd(length: int, chunk: int) -> list[int]:
    """One token first, then sizes with no common measure, from two tokens to more than two chunks."""
    unit = max(1, min(chunk, length // 8))
    return _fill(length, [1, 3, unit // 2 + 1, 2, unit + 3, 5, 2 * unit + 7, unit // 3 + 1])


def _equal(length: int, size: int) -> list[int]:
    return _fill(length, [size])


def _decode(length: int, chunk: int) -> list[int]:
    """Single tokens around up to five boundaries (or, without any, at the end of the text), long calls between."""
    count = boundaries(length, chunk)
    wanted = (
        {round(1 + i * (count - 1) / (_DECODED_BOUNDARIES - 1)) for i in range(_DECODED_BOUNDARIES)} if count else ()
    )
    centres = sorted(boundary * chunk for boundary in wanted) or [length - _STEPS_AROUND]
    sizes: list[int] = []
    at = 0
    for centre in centres:
        start = min(max(centre - _STEPS_AROUND, at + (at == 0)), length)  # something to attend to comes first
        stop = min(max(centre + _STEPS_AROUND, start), length)
        sizes += [start - at] * (start > at) + [1] * (stop - start)
        at = stop
    return sizes + [length - at] * (length > at)
