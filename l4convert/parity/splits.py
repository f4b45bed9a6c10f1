"""The ways of feeding the same tokens, as data: any of them must give the same logits (DESIGN, section 4).

They aim at what goes wrong in a chunked model: a call that starts or ends inside a chunk, that spans several chunks,
that ends exactly at a boundary, single tokens on both sides of one, and padding that shifts rows against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from l4convert.runtime.prefill import prefill_steps

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
    return one_row("one call", "the whole window at once", [length])


def single_row_splits(length: int, chunk: int) -> tuple[Split, ...]:
    """Every way but :func:`one_call` of feeding one text of ``length`` tokens to a model with chunks of ``chunk``."""
    candidates = (
        one_row(
            "odd splits",
            "calls of irregular sizes, cut at odd places in chunks",
            _fill(length, _odd_sizes(length, chunk)),
        ),
        one_row("whole chunks", "calls that end exactly at chunk boundaries", _equal(length, chunk)),
        one_row("token by token", "single tokens on both sides of chunk boundaries", _decode(length, chunk)),
    )
    return tuple(split for split in candidates if len(split.calls) > 1)


def steps(length: int, chunk: int, limit: Callable[[int], int]) -> Split:
    """A text that is too long for one call: what the other splits are held against then.

    Args:
        length: Tokens of the text; ``chunk``: C.
        limit: The most tokens of a call, for the length of the context after it.
    """
    sizes = list(prefill_steps(0, length, chunk, limit))
    return one_row("steps", f"calls that end at chunk boundaries, of at most {max(sizes)} tokens", sizes)


def long_splits(length: int, chunk: int, limit: int) -> tuple[Split, ...]:
    """Every way but :func:`steps` of feeding one long text, in calls of at most ``limit`` tokens."""
    odd = _fill(length, [min(size, limit) for size in _odd_sizes(length, chunk)])
    decode: list[int] = []
    at = 0
    for size in _decode(length, chunk):
        decode += prefill_steps(at, size, chunk, limit)
        at += size
    return (
        one_row("odd splits", "calls of irregular sizes, cut at odd places in chunks", odd),
        one_row("token by token", "single tokens on both sides of chunk boundaries", decode),
    )


def joined(split: Split, limit: int) -> Split:
    """The same tokens in fewer calls: as many together as make no more than ``limit`` of any row."""
    calls: list[tuple[int, ...]] = []
    for call in split.calls:
        together = tuple(map(sum, zip(calls[-1], call.counts, strict=True))) if calls else ()
        if calls and max(together) <= limit:
            calls[-1] = together
        else:
            calls.append(call.counts)
    return Split(split.name, split.description, tuple(Call(counts) for counts in calls))


def row_of(split: Split, row: int) -> Split:
    """One text of a batch, alone; calls that it sat out are left out."""
    return one_row(split.name, split.description, [call.counts[row] for call in split.calls if call.counts[row]])


def batch_splits(length: int, chunk: int, limit: int | None = None) -> tuple[Split, ...]:
    """Batches of texts of unequal lengths, none over ``length``: a padded prompt, then single tokens for all.

    Args:
        length: Tokens of the longest text there is; ``chunk``: C.
        limit: The most tokens of a row in a call; None: any number. A longer prompt comes in parts, each padded.
    """
    if length < 12:
        return ()
    unit = max(4, min(chunk, length // 3))
    lengths = [unit + 3, 2 * unit + unit // 2, unit // 2]
    decoded = min(_DECODED_AFTER_PADDING, min(lengths) - 1)
    prompt = tuple(row - decoded for row in lengths)
    parts = -(-max(prompt) // limit) if limit else 1
    prompts = [tuple(row * (i + 1) // parts - row * i // parts for row in prompt) for i in range(parts)]
    decode = (Call((1,) * len(lengths)),) * decoded
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    return tuple(
        Split(
            f"batch, {side} padding",
            f"{len(lengths)} texts of unequal lengths",
            (*(Call(part, side) for part in prompts), *decode),
        )
        for side in sides
    )


def boundaries(length: int, chunk: int) -> int:
    """How many chunk boundaries lie inside a text of ``length`` tokens."""
    return max(0, (length - 1) // chunk)


def one_row(name: str, description: str, sizes: Sequence[int]) -> Split:
    """One text in calls of these sizes."""
    return Split(name, description, tuple(Call((size,)) for size in sizes))


def _fill(length: int, sizes: Sequence[int]) -> list[int]:
    """Sizes repeated until they add up to ``length``, the last one cut."""
    taken: list[int] = []
    left = length
    for size in cycle(sizes):
        if left <= 0:
            break
        taken.append(min(size, left))
        left -= taken[-1]
    return taken


def _odd_sizes(length: int, chunk: int) -> tuple[int, ...]:
    """One token first, then sizes with no common measure, from two tokens to more than two chunks."""
    unit = max(1, min(chunk, length // 8))
    return 1, 3, unit // 2 + 1, 2, unit + 3, 5, 2 * unit + 7, unit // 3 + 1


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
