"""Rows of ``benchmarks/convert.py``: what was measured, its ratios, and how that looks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workloads import COLD, CP, LLAMA, ORT, READ, WARM

HEADER = (
    "what", "cache", "s", "G params/s", "GB/s in", "GB out", "of read", "of cp", "x llama.cpp", "x ONNX Runtime",
    "peak RSS, GB", "anonymous, GB",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One workload, measured some times; or why it was not.

    Attributes:
        parameters: That it worked on.
        bytes_in: Of the checkpoint, or of the sample in BF16.
        bytes_out: Of all that it wrote.
        seconds: Of each run.
        peak_rss: Bytes, of the worst run; ``peak_anonymous`` likewise.
    """

    what: str
    group: str
    cache: str
    missing: str = ""
    parameters: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: tuple[float, ...] = ()
    peak_rss: int = 0
    peak_anonymous: int = 0

    @property
    def rate(self) -> float:
        """Parameters a second, in the best run; 0 where there is none."""
        return self.parameters / min(self.seconds) if self.seconds else 0.0


def with_sums(rows: Sequence[Row]) -> list[Row]:
    """The rows, and after each of llama.cpp's quantizations one of it and the conversion before it together."""
    convert = next((row for row in rows if row.what == f"{LLAMA} convert" and row.seconds), None)
    result: list[Row] = []
    for row in rows:
        result.append(row)
        if convert and row.seconds and row.what.startswith(f"{LLAMA} quantize"):
            result.append(together(convert, row))
    return result


def together(first: Row, second: Row) -> Row:
    seconds = tuple(a + b for a, b in zip(first.seconds, second.seconds, strict=True))
    rss, anonymous = max(first.peak_rss, second.peak_rss), max(first.peak_anonymous, second.peak_anonymous)
    what = second.what.replace("quantize", "convert + quantize")
    return Row(what, first.group, first.cache, "", first.parameters, first.bytes_in, second.bytes_out, seconds,
               rss, anonymous)  # fmt: skip


def baselines(rows: Sequence[Row], cache: str) -> dict[str, float]:
    """Parameters a second of what a row is compared with: of several, the fastest."""
    rates = {
        READ: [row.rate for row in rows if row.what == READ and row.cache == cache == COLD],
        CP: [row.rate for row in rows if row.what == CP and row.cache == cache],
        LLAMA: [row.rate for row in rows if "convert + quantize" in row.what and cache == WARM],
        ORT: [row.rate for row in rows if row.group == ORT and cache == WARM],
    }
    return {name: max(values, default=0.0) for name, values in rates.items()}


def as_json(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row and its ratios; a ratio is null where there is nothing to compare with."""
    head = {"what": row.what, "group": row.group, "cache": row.cache}
    if not row.seconds:
        return {**head, "missing": row.missing}
    ratios = {name: row.rate / rate if rate else None for name, rate in baselines(rows, row.cache).items()}
    return {
        **head,
        "seconds": [round(value, 3) for value in row.seconds],
        "median_seconds": round(statistics.median(row.seconds), 3),
        "parameters": row.parameters,
        "bytes_in": row.bytes_in,
        "bytes_out": row.bytes_out,
        "parameters_per_second": row.rate,
        "bytes_in_per_second": row.bytes_in / min(row.seconds),
        "ratios": ratios,
        "peak_rss_bytes": row.peak_rss,
        "peak_anonymous_bytes": row.peak_anonymous,
    }


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, rates and ratios of the best runs."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(as_json(row, rows))) + " |" for row in rows]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["what"], row["cache"]]
    if "missing" in row:
        return [*head, f"not measured: {row['missing']}", *[""] * (len(HEADER) - 3)]
    ratios = row["ratios"]
    parts = ["" if ratios[name] is None else f"{ratios[name]:.0%}" for name in (READ, CP)]
    times = ["" if ratios[name] is None else f"{ratios[name]:.2f}" for name in (LLAMA, ORT)]
    return [
        *head,
        f"{min(row['seconds']):.2f}",
        f"{row['parameters_per_second'] / 1e9:.3f}",
        f"{row['bytes_in_per_second'] / 1e9:.3f}",
        f"{row['bytes_out'] / 1e9:.3f}",
        *parts,
        *times,
        *(f"{row[key] / 1e9:.3f}" for key in ("peak_rss_bytes", "peak_anonymous_bytes")),
    ]
