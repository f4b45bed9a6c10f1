"""Read what ONNX Runtime's profiler writes: the time of each node, counted once.

The profiler writes one event for each node that ran. That of an ``If`` or a ``Loop`` covers the nodes of its body,
which have events of their own, so adding all up would count these twice. Here each event counts for what is left of it
without the events inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.errors import InputError

_SUFFIX = "_kernel_time"
_RUN = "model_run"


@dataclass(frozen=True)
class RunTrace:
    """One call of a graph.

    Attributes:
        seconds: From its beginning to its end.
        nodes: Seconds of each node by name, without those of the nodes inside it.
    """

    seconds: float
    nodes: Mapping[str, float]

    @property
    def between(self) -> float:
        """What is no node's: the runtime itself, between nodes."""
        return self.seconds - sum(self.nodes.values())


def read_trace(file: Path) -> list[RunTrace]:
    """The calls in a profile, in order.

    Raises:
        InputError: The file is none.
    """
    try:
        return list(runs(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: not a profile of ONNX Runtime: {error!r}") from error


def runs(events: Sequence[Mapping[str, Any]]) -> Iterator[RunTrace]:
    """The calls in a profile's events (Chrome trace format: ``ts`` and ``dur`` in microseconds)."""
    calls = sorted((event for event in events if event["name"] == _RUN), key=lambda event: event["ts"])
    nodes = sorted(
        (event for event in events if event["cat"] == "Node" and event["name"].endswith(_SUFFIX)),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    at = 0
    for call in calls:
        end = call["ts"] + call["dur"]
        while at < len(nodes) and nodes[at]["ts"] < call["ts"]:
            at += 1  # of no call: what loading the graph ran
        first = at
        while at < len(nodes) and nodes[at]["ts"] <= end:
            at += 1
        yield RunTrace(call["dur"] / 1e6, own_times(nodes[first:at]))


def own_times(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each node without those inside it.

    Args:
        nodes: Events sorted by beginning, the longer one first where two begin together.
    """
    times: dict[str, float] = {}
    around: list[tuple[float, str]] = []  # end and name of the events that the next one may lie in
    for event in nodes:
        begin, duration, name = event["ts"], event["dur"], event["name"].removesuffix(_SUFFIX)
        while around and around[-1][0] <= begin:
            around.pop()
        if around:
            outer = around[-1][1]
            times[outer] -= duration / 1e6
        times[name] = times.get(name, 0.0) + duration / 1e6
        around.append((begin + duration, name))
    return times
