"""Feed one sequence to the lengths that were asked for, and time each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from l4convert.bench.results import WARM_UP, Point, Prefill
from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.memory import peak_resident_bytes
from l4convert.progress import Task
from l4convert.runtime.prefill import prefill_steps, step_limit
from l4convert.runtime.runner import IntArray

_SEED = 0


class Subject(Protocol):
    """A sequence in a runner."""

    def feed(self, ids: IntArray) -> None:
        """Append tokens [1, S]; what comes out for the last one is there when this returns."""
        ...

    def cache_bytes(self) -> Mapping[str, int] | None:
        """Bytes of the caches now, by kind of layer; None where that is not known."""
        ...


class Source(Protocol):
    """Begins sequences."""

    def fresh(self) -> Subject:
        """An empty one."""
        ...

    def filled(self, length: int) -> Subject:
        """One of this length, with random numbers in its caches."""
        ...


@dataclass(frozen=True)
class Sweep:
    """What to do with a source.

    Attributes:
        config: The model's hyperparameters.
        contexts: Lengths, ascending.
        decode_tokens: The last so many of each go in one by one.
        synthetic: Begin each length with filled caches.
    """

    config: DecoderConfig
    contexts: tuple[int, ...]
    decode_tokens: int
    synthetic: bool

    @property
    def tokens(self) -> int:
        """How many are fed in all."""
        return self.decode_tokens * len(self.contexts) if self.synthetic else self.contexts[-1]

    def steps(self, at: int, end: int) -> Iterator[int]:
        """Sizes of the steps of prefill between two lengths."""
        limit = lambda context: step_limit(self.config, context)  # noqa: E731  # shorter than a function here
        return prefill_steps(at, end - at, self.config.attention_chunk_size, limit)


def sweep(
    source: Source,
    plan: Sweep,
    used: Callable[[int], Mapping[str, int]] | None,
    task: Task,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Point]:
    """Measure every length.

    Args:
        source: What to feed.
        plan: How far.
        used: Bytes of the caches that hold tokens, by length; None: not known.
        task: Is told of every token.
        clock: Seconds.
    """
    feeder = _Feeder(plan, task, clock)
    feeder.warm_up(source)
    points: list[Point] = []
    subject = None if plan.synthetic else source.fresh()
    at, so_far = 0, Prefill(0, 0.0, 0, 0.0)
    for context in plan.contexts:
        begin = context - plan.decode_tokens
        if plan.synthetic:
            subject = None  # before the next one is made: two may not fit
            subject = source.filled(begin)
        assert subject is not None
        if not plan.synthetic:
            seconds = feeder.prefill(subject, at, begin)
            so_far = Prefill(so_far.tokens + begin - at, so_far.seconds + seconds, begin - at, seconds)
        decoded, held = feeder.decode(subject)
        at = context
        points.append(
            Point(
                context=context,
                prefill=None if plan.synthetic else so_far,
                decode_ms=tuple(1000 * seconds for seconds in counted(decoded)),
                cache_bytes=held,
                cache_used_bytes=None if used is None else used(context - 1),
                peak_rss=peak_resident_bytes(),
            )
        )
    return points


def counted(steps: list[float]) -> list[float]:
    """Those of a length's decode steps that count, see :data:`WARM_UP`; one at least."""
    return steps[min(len(steps) - 1, int(len(steps) * WARM_UP)) :]


class _Feeder:
    """Feeds random tokens, the same ones to every source."""

    def __init__(self, plan: Sweep, task: Task, clock: Callable[[], float]) -> None:
        self._plan = plan
        self._task = task
        self._clock = clock
        self._rng = np.random.default_rng(_SEED)

    def warm_up(self, source: Source) -> None:
        """A chunk, and a token, that nobody counts: the first calls make threads, pools and plans."""
        subject = source.fresh()
        for width in (min(self._plan.config.attention_chunk_size, self._plan.contexts[0] - 1), 1):
            for size in self._plan.steps(0, width):
                subject.feed(np.zeros((1, size), np.int64))

    def prefill(self, subject: Subject, at: int, end: int) -> float:
        """Feed up to a length; seconds."""
        return sum(self._feed(subject, size) for size in self._plan.steps(at, end))

    def decode(self, subject: Subject) -> tuple[list[float], Mapping[str, int] | None]:
        """Feed single tokens; seconds of each, and bytes of the caches as the last one finds them.

        Not as it leaves them: where it is the last of a chunk, some forms of cache have given that chunk up then.
        """
        seconds = [self._feed(subject, 1) for _ in range(self._plan.decode_tokens - 1)]
        held = subject.cache_bytes()
        return [*seconds, self._feed(subject, 1)], held

    def _feed(self, subject: Subject, size: int) -> float:
        ids = self._rng.integers(0, self._plan.config.vocab_size, (1, size), dtype=np.int64)
        begun = self._clock()
        subject.feed(ids)
        seconds = self._clock() - begun
        self._task.advance(size)
        return seconds
