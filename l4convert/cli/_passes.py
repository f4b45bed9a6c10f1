"""How the reports of passes are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l4convert.cli._render import table

if TYPE_CHECKING:
    from l4convert.graph_passes import PassReport


def passes_payload(passes: Sequence[PassReport]) -> list[dict[str, Any]]:
    """The reports for ``--json``."""
    return [
        {
            "name": report.name,
            "fired": report.fired,
            "skipped": [{"node": node, "reason": reason} for node, reason in report.skipped],
            "notes": [{"node": node, "remark": remark} for node, remark in report.notes],
        }
        for report in passes
    ]


def passes_text(passes: Sequence[PassReport], verbose: bool) -> str:
    """How often each pass fired, and remarks; with ``verbose``, why it did not fire elsewhere, by reason."""
    rows = [(report.name, report.fired, len(report.skipped)) for report in passes]
    text = table(["pass", "fired", "skipped"], rows, right=[1, 2])
    reasons = [
        f"{report.name} skipped {number}: {reason}"
        for report in passes
        for reason, number in Counter(reason for _, reason in report.skipped).items()
    ]
    return "\n".join([text, *notes_lines(passes), *(reasons if verbose else [])])


def notes_lines(passes: Sequence[PassReport]) -> list[str]:
    """What users should know about how places were rewritten: a line a remark, with how many places it is about."""
    return [
        f"{report.name}: {number:,} weights {remark}"
        for report in passes
        for remark, number in Counter(remark for _, remark in report.notes).items()
    ]
