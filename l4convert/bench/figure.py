"""The plot of a benchmark: decode, prefill and memory against the length of the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4convert.bench.plot import COLOURS, draw
from l4convert.bench.results import KINDS, BenchReport, Curve, Point
from l4convert.planning.tokens import short_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (11.0, 8.0)  # inches
_MB = 1e6

# Global attention on top: it is what is to be seen growing. The colours of the rest differ in lightness, too.
_STACK = {
    "other": "#d9d9d9",
    "head": "#bdbdbd",
    "feed-forward": COLOURS["third"],
    "projections": COLOURS["sixth"],
    "positions and masks": COLOURS["fourth"],
    "chunked attention": COLOURS["fifth"],
    "global attention": COLOURS["ours"],
}


def draw_report(report: BenchReport, file: Path) -> None:
    """Draw a report into a file, ``.svg`` or ``.png``.

    Raises:
        UsageError, InputError, BackendMissing: See :func:`l4convert.bench.plot.draw`.
    """

    def paint(panels: list[Axes]) -> None:
        for axes, panel in zip(panels, (_decode, _parts, _prefill, _memory), strict=True):
            panel(axes, report)
            _contexts(axes, [point.context for point in report.ours.points])

    draw(file, _SIZE, (2, 2), paint)


def _curves(report: BenchReport) -> list[tuple[Curve, str, str]]:
    """Each curve with its colour and its name in the legend."""
    ours = (report.ours, COLOURS["theirs"], f"l4convert: {report.facts['recipe']}, {report.ours.caches} caches")
    if report.reference is None:
        return [ours]
    return [ours, (report.reference, "black", f"transformers: {report.reference.dtype}")]


def _decode(axes: Axes, report: BenchReport) -> None:
    for curve, colour, name in _curves(report):
        axes.plot(
            [point.context for point in curve.points], [point.decode_median_ms for point in curve.points],
            marker="o", color=colour, label=name,
        )  # fmt: skip
    axes.set(title="Decode: milliseconds a token (median)", ylim=(0, None))
    axes.legend(loc="upper left")


def _parts(axes: Axes, report: BenchReport) -> None:
    points = [(point.context, point.breakdown) for point in report.ours.points if point.breakdown is not None]
    axes.set(title="The same step of l4convert under the profiler: milliseconds")
    if not points:
        _remark(axes, "not profiled")
        return
    parts = [[found.parts_ms[kind] for _, found in points] for kind in _STACK]
    contexts = [context for context, _ in points]
    axes.stackplot(contexts, parts, labels=list(_STACK), colors=list(_STACK.values()), alpha=0.9)
    axes.set(ylim=(0, None))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left")


def _prefill(axes: Axes, report: BenchReport) -> None:
    axes.set(title="Prefill: tokens a second since the length before")
    for curve, colour, name in _curves(report):
        points = [(point.context, point.prefill) for point in curve.points if point.prefill is not None]
        rates = [prefill.last_tokens / prefill.last_seconds for _, prefill in points]
        if points:
            axes.plot([context for context, _ in points], rates, marker="o", color=colour, label=name)
    if not axes.get_lines():
        _remark(axes, "caches were filled, not computed")
        return
    axes.set(ylim=(0, None))
    axes.legend(loc="best")


def _memory(axes: Axes, report: BenchReport) -> None:
    # Both may hold the same bytes: transformers' lines are broad, and lie under ours.
    for curve, colour, _ in reversed(_curves(report)):
        ours = curve is report.ours
        look: dict[str, Any] = {"color": colour, "marker": "."} if ours else {"color": "#b0b0b0", "linewidth": 5}
        short = "l4convert" if ours else "transformers"
        contexts = [point.context for point in curve.points]
        peaks = [point.peak_rss / _MB for point in curve.points]
        axes.plot(contexts, peaks, "--", **look, label=f"{short}: the process, peak")
        for kind, style in (("global", "-"), ("chunked", ":")):
            held = [found[kind] / _MB for point in curve.points if (found := _held(point)) is not None]
            if len(held) == len(contexts):
                label = f"{short}: keys and values, {kind} layers"
                axes.plot(contexts, held, style, **look, label=label)
    axes.set(title="Memory: MB", yscale="log")
    axes.set_ylim(top=axes.get_ylim()[1] * 200)  # room for the legend
    axes.legend(loc="upper left")


def _held(point: Point) -> Mapping[str, int] | None:
    """Bytes in use where that is known, else bytes allocated."""
    return point.cache_used_bytes or point.cache_bytes


def _remark(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", transform=axes.transAxes)


def _contexts(axes: Axes, contexts: Sequence[int]) -> None:
    axes.set_xlabel("context (tokens)")
    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0] / 1.2, contexts[-1] * 1.2)
    axes.set_xticks(list(contexts), [short_tokens(context) for context in contexts])
    axes.minorticks_off()


assert set(_STACK) == set(KINDS)
