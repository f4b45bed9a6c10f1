"""Times of nodes from a profile: each microsecond once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.bench.trace import read_trace, runs
from l4convert.errors import InputError


def node(name: str, ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": "Any"}}


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def test_a_node_around_others_counts_for_the_rest() -> None:
    # As ONNX Runtime writes them: what is inside first, by its end.
    events = [
        {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 9, "args": {}},
        node("a", 100, 10),
        node("inner/deep", 121, 5),
        node("inner/loop", 120, 8),
        node("inner/last", 130, 20),
        node("If", 115, 40),
        node("b", 155, 5),
        run(95, 70),
        node("a", 203, 4),
        run(200, 10),
    ]
    first, second = runs(events)
    microseconds = {name: round(1e6 * seconds) for name, seconds in first.nodes.items()}
    assert microseconds == {"a": 10, "If": 12, "inner/loop": 3, "inner/deep": 5, "inner/last": 20, "b": 5}
    assert first.seconds == pytest.approx(70e-6)
    assert first.between == pytest.approx(15e-6)
    assert (second.seconds, dict(second.nodes)) == (pytest.approx(10e-6), {"a": pytest.approx(4e-6)})


@st.composite
def nested(draw: st.DrawFn, begin: int = 0, end: int = 10_000, depth: int = 3) -> list[tuple[int, int]]:
    """Intervals, each inside another or apart from it."""
    found = []
    at = begin
    while at < end and draw(st.booleans()):
        start = draw(st.integers(at, end))
        stop = draw(st.integers(start, end))
        found.append((start, stop))
        if depth:
            found += draw(nested(start, stop, depth - 1))
        at = stop + 1
    return found


@given(intervals=nested())
def test_however_nodes_nest_their_times_are_what_they_cover(intervals: list[tuple[int, int]]) -> None:
    covered = {moment for start, stop in intervals for moment in range(start, stop)}
    events = [node(str(i), start, stop - start) for i, (start, stop) in enumerate(intervals)]
    (trace,) = runs([*events, run(0, 10_000)])
    assert sum(trace.nodes.values()) == pytest.approx(len(covered) / 1e6)
    assert trace.between == pytest.approx((10_000 - len(covered)) / 1e6)


def test_a_file_that_is_no_profile(tmp_path: Path) -> None:
    for content in ("", "[", '[{"name": 3}]', "7"):
        file = tmp_path / "profile.json"
        file.write_text(content)
        with pytest.raises(InputError, match=r"profile\.json: not a profile of ONNX Runtime"):
            read_trace(file)
