"""Plain text for people: aligned columns that survive a pipe, and short forms of numbers and lists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Columns two spaces apart; those whose index is in ``right`` are aligned to the right."""
    cells = [[_printable(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])
    lines = [
        [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)] for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def fields(pairs: Sequence[tuple[str, object]]) -> str:
    """``name  value`` lines with the values aligned."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {_printable(value)}".rstrip() for name, value in pairs)


def _printable(value: object) -> str:
    """On one line, and without what a terminal would obey: names come from files that nobody vouches for."""
    text = str(value)
    return text if text.isprintable() else ascii(text)[1:-1]


def ranges(indices: Sequence[int]) -> str:
    """Sorted indices in short: ``0-2, 4-6`` or, for an even step over 1, ``3, 7, ..., 47``."""
    steps = {b - a for a, b in pairwise(indices)}
    if len(indices) > 3 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def count(number: float) -> str:
    """Parameters in short: ``16.5 M``, ``109 B``, ``2.0 T``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.0f} {unit}" if scaled >= 100 else f"{scaled:.1f} {unit}"
    return f"{number:.0f}"


def size(nbytes: float) -> str:
    """Bytes in short, powers of 1000."""
    from l4convert.progress import format_amount

    return format_amount(nbytes, "B")
