"""What a benchmark is asked for, what it found, and the JSON of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from l4convert.runtime import ON_CPU, RunWith

Dtype = Literal["float32", "bfloat16"]

KINDS = (
    "global attention",
    "chunked attention",
    "positions and masks",
    "projections",
    "feed-forward",
    "head",
    "other",
)
"""Kinds of work that a step's time is divided into; see :mod:`l4convert.bench.kinds`."""


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        artifact: Folder that ``convert`` wrote.
        contexts: Lengths in tokens, ascending; None: :data:`DEFAULT_CONTEXTS`, as far as the model has positions.
        reference: A checkpoint to run with transformers, too; ``reference_dtype``: in which type.
        decode_tokens: The last so many tokens of each length go in one by one and are timed.
        threads: For one operator; None: the runtime's choice.
        synthetic: Fill the caches with random numbers, and time no prefill.
        breakdown: Run once more under ONNX Runtime's profiler, to see where a step's time goes.
        run_with: What runs the artifact.
    """

    artifact: Path
    contexts: tuple[int, ...] | None = None
    reference: Path | None = None
    reference_dtype: Dtype = "float32"
    decode_tokens: int = 32
    threads: int | None = None
    synthetic: bool = False
    breakdown: bool = True
    run_with: RunWith = ON_CPU


DEFAULT_CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16)

WARM_UP = 1 / 4
"""Part of the decode steps at each length that is not counted: the first call at a length allocates."""


@dataclass(frozen=True)
class Prefill:
    """How long the prompt took.

    Attributes:
        tokens: From the beginning; ``seconds``: they took, all steps together.
        last_tokens: Since the length measured before; ``last_seconds``: those took.
    """

    tokens: int
    seconds: float
    last_tokens: int
    last_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, rates included."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens / self.seconds,
            "last_tokens_per_second": self.last_tokens / self.last_seconds,
        }


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a decode step goes, under the profiler.

    Attributes:
        steps: How many were looked at; ``total_ms``: of one, on average.
        parts_ms: Kind of work -> its part of that; they add up to it.
    """

    steps: int
    total_ms: float
    parts_ms: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """What was measured at one length.

    Attributes:
        context: Tokens after the last decode step.
        prefill: None where caches were filled with random numbers.
        decode_ms: Each counted decode step, in order.
        cache_bytes: Key/value caches by kind of layer (``global``, ``chunked``) as the last decode step finds them,
            with ``context - 1`` tokens: what is allocated; ``cache_used_bytes``: what of it is in use. None where the
            runtime does not tell.
        peak_rss: The most bytes that the process has had in memory so far.
        breakdown: None where there is no profiler.
    """

    context: int
    prefill: Prefill | None
    decode_ms: tuple[float, ...]
    cache_bytes: Mapping[str, int] | None
    cache_used_bytes: Mapping[str, int] | None
    peak_rss: int
    breakdown: Breakdown | None = None

    @property
    def decode_median_ms(self) -> float:
        """Of the counted steps."""
        return median(self.decode_ms)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the median included."""
        return {
            "context": self.context,
            "prefill": None if self.prefill is None else self.prefill.to_json(),
            "decode": {"median_ms": self.decode_median_ms, "ms": list(self.decode_ms)},
            "cache_bytes": None if self.cache_bytes is None else dict(self.cache_bytes),
            "cache_used_bytes": None if self.cache_used_bytes is None else dict(self.cache_used_bytes),
            "peak_rss_bytes": self.peak_rss,
            "breakdown": None if self.breakdown is None else asdict(self.breakdown),
        }


@dataclass(frozen=True)
class Curve:
    """One runner over all lengths.

    Attributes:
        name: What ran; ``dtype``: the type that it computes in; ``caches``: how it keeps keys and values.
    """

    name: str
    dtype: str
    caches: str
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "caches": self.caches,
            "points": [p.to_json() for p in self.points],
        }


@dataclass(frozen=True)
class BenchReport:
    """Everything that was found.

    Attributes:
        ours: The artifact; ``reference``: transformers, where it was asked for.
        facts: What describes the run: artifact, machine, versions, options.
    """

    ours: Curve
    reference: Curve | None
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values, of schema ``l4convert.bench/1``; docs/guides/long-context.md describes it."""
        return {
            **self.facts,
            "ours": self.ours.to_json(),
            "reference": None if self.reference is None else self.reference.to_json(),
            "growth": None if (found := growth(self.ours)) is None else asdict(found),
        }


@dataclass(frozen=True)
class Growth:
    """What a decode step takes more at the longest context than at the shortest, under the profiler.

    Attributes:
        total_ms: Together; ``parts_ms``: of each kind of work.
    """

    shortest: int
    longest: int
    total_ms: float
    parts_ms: Mapping[str, float]

    @property
    def global_attention(self) -> float | None:
        """Its part of what grew; None where nothing did."""
        return self.parts_ms[KINDS[0]] / self.total_ms if self.total_ms > 0 else None


def growth(curve: Curve) -> Growth | None:
    """Compare the ends of a curve; None where there is no breakdown of both."""
    first, last = curve.points[0], curve.points[-1]
    if first is last or first.breakdown is None or last.breakdown is None:
        return None
    before, after = first.breakdown, last.breakdown
    parts = {kind: after.parts_ms[kind] - before.parts_ms[kind] for kind in KINDS}
    return Growth(first.context, last.context, after.total_ms - before.total_ms, parts)
