"""Measure an artifact; each function runs in a process of its own (:mod:`l4convert.bench.process`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l4convert.bench.caches import CacheSizes, random_cache
from l4convert.bench.kinds import OTHER, NodeKinds, divide
from l4convert.bench.results import Breakdown, Curve
from l4convert.bench.sweep import Sweep, counted, sweep
from l4convert.bench.trace import RunTrace, read_trace
from l4convert.errors import UsageError
from l4convert.progress import Task
from l4convert.runtime import OrtSession, OrtStream, Runner, RunWith, Stream, read_artifact
from l4convert.runtime.runner import IntArray, last_logits


@dataclass(frozen=True)
class StreamSubject:
    """A stream of one row."""

    stream: Stream

    def feed(self, ids: IntArray) -> None:
        """Append tokens [1, S]."""
        last_logits(self.stream, ids)

    def cache_bytes(self) -> Mapping[str, int] | None:
        """Of ONNX Runtime's caches."""
        return self.stream.cache_bytes() if isinstance(self.stream, OrtStream) else None


@dataclass(frozen=True)
class RunnerSource:
    """Streams of an open artifact."""

    runner: Runner

    def fresh(self) -> StreamSubject:
        """An empty one."""
        return StreamSubject(self.runner.start(1))

    def filled(self, length: int) -> StreamSubject:
        """One with random numbers in its caches.

        Raises:
            UsageError: It is an engine's.
        """
        if not isinstance(self.runner, OrtSession):
            raise UsageError("--synthetic fills caches of ONNX Runtime, not of an engine", "leave out --engine")
        return StreamSubject(self.runner.restore(np.array([length]), random_cache))


@dataclass(frozen=True)
class Order:
    """What to run: an artifact, by what, with how many threads, and how far."""

    artifact: Path
    run_with: RunWith
    threads: int | None
    plan: Sweep


def measure(order: Order, task: Task) -> Curve:
    """Time an artifact at every length."""
    info = read_artifact(order.artifact)
    runner = order.run_with.open(order.artifact, max_length=order.plan.contexts[-1], threads=order.threads)
    with runner:
        used = CacheSizes.of(info).used if isinstance(runner, OrtSession) else None
        points = sweep(RunnerSource(runner), order.plan, used, task)
        return Curve(runner.name, info.compute, info.kv_cache, tuple(points))


def profile(order: Order, task: Task) -> list[Breakdown]:
    """Where the time of decode steps goes at every length, on caches of random numbers.

    A profiler takes time itself (some microseconds a node), so what is timed by :func:`measure` runs without it.
    """
    kinds = NodeKinds.of(read_artifact(order.artifact))
    found = []
    with tempfile.TemporaryDirectory(prefix="l4convert-") as folder:
        for context in order.plan.contexts:
            steps = _profiled(order, context, Path(folder) / "profile", task)
            found.append(breakdown(steps, kinds))
    return found


def _profiled(order: Order, context: int, prefix: Path, task: Task) -> list[RunTrace]:
    """The calls of one length's decode steps that count."""
    session = OrtSession.open(order.artifact, max_length=context, threads=order.threads, profile=prefix)
    with session:
        subject = RunnerSource(session).filled(context - order.plan.decode_tokens)
        for token in np.random.default_rng(1).integers(0, session.config.vocab_size, order.plan.decode_tokens):
            subject.feed(np.array([[token]], np.int64))
            task.advance(1)
        file = session.end_profile()
    calls = read_trace(file)
    file.unlink()
    return counted_calls(calls, order.plan.decode_tokens)


def counted_calls(calls: list[RunTrace], steps: int) -> list[RunTrace]:
    """Those that count of the calls of so many steps, each of one call."""
    return calls[-len(counted([0.0] * steps)) :]


def breakdown(calls: list[RunTrace], kinds: NodeKinds) -> Breakdown:
    """The average of the faster half: what another program on the machine delays is no kind of work."""
    kept = sorted(calls, key=lambda call: call.seconds)[: (len(calls) + 1) // 2]
    parts: dict[str, float] = {}
    for call in kept:
        for kind, seconds in divide(call.nodes, kinds).items():
            parts[kind] = parts.get(kind, 0.0) + 1000 * seconds / len(kept)
        parts[OTHER] += 1000 * call.between / len(kept)
    return Breakdown(len(kept), sum(1000 * call.seconds for call in kept) / len(kept), parts)
