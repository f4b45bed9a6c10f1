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
        }
        for report in passes
    ]


def passes_text(passes: Sequence[PassReport], verbose: bool) -> str:
    """How often each pass fired; with ``verbose``, why it did not elsewhere, by reason."""
    rows = [(report.name, report.fired, len(report.skipped)) for report in passes]
    text = table(["pass", "fired", "skipped"], rows, right=[1, 2])
    reasons = [
        f"{report.name} skipped {number}: {reason}"
        for report in passes
        for reason, number in Counter(reason for _, reason in report.skipped).items()
    ]
    return "\n".join([text, *reasons]) if verbose and reasons else text
