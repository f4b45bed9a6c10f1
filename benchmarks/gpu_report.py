"""What ``benchmarks/gpu.py`` prints and writes: sections of one table, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_correctness import Checked, as_figures
from gpu_speed import Timed, aims
from gpu_workloads import Row
from roofline import Limits

SCHEMA = "l4convert.gpu/2"
Figures = Mapping[str, Any]
Lines = list[tuple[str, Figures | str]]  # a row's name, and its figures or why there are none

SPEED_COLUMNS = (
    *("GB", "TFLOP", "at least us", "us", "of copy", "of matrix", "torch us", "x torch", "ORT us", "x ORT"),
    *("diff. to torch", "aim"),
)


@dataclass(frozen=True)
class Section:
    """A part of the table with columns of its own; ``note``: a line under its title."""

    title: str
    lines: Lines
    columns: Sequence[str] = ()
    note: str = ""

    def markdown(self) -> str:
        """Title, note and rows; a column for every figure that some row has, in order."""
        found = dict.fromkeys(key for _, cells in self.lines if not isinstance(cells, str) for key in cells)
        columns = list(self.columns or found) or [""]
        table = [["row", *columns], ["---"] * (1 + len(columns))]
        for name, cells in self.lines:
            if isinstance(cells, str):
                table.append([name, cells, *[""] * (len(columns) - 1)])
            else:
                table.append([name, *(shown(cells.get(column)) for column in columns)])
        head = [f"## {self.title}", *([self.note] if self.note else [])]
        return "\n".join([*head, "", *(f"| {' | '.join(line)} |" for line in table)] if self.lines else head)


def shown(value: Any) -> str:
    """A cell."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.4g}" if abs(value) < 1 else f"{value:,.5g}"


def limits_section(measured: Mapping[str, float]) -> Section:
    return Section("This GPU's own limits", [(name, {"measured": f"{value:.4g}"}) for name, value in measured.items()])


def correctness_section(title: str, results: Sequence[Checked]) -> Section:
    lines: Lines = []
    for result in results:
        figures = as_figures(result)
        if result.problem and result.measured:
            figures["worst case"] = f"{result.problem}: {result.worst}"
        lines.append((result.row, figures if result.measured else result.problem))
    return Section(title, lines)


def speed_section(results: Sequence[Timed], limits: Limits, note: str = "") -> Section:
    """Rows of real shapes; a row that was not run has what it would move and multiply."""
    named = {result.row.name: result for result in results}
    lines: Lines = [(result.row.name, speed_figures(result, limits, named)) for result in results]
    reasons = Counter(reason for result in results for reason in result.notes)
    missing = [f"not measured in {rows} rows: {reason}" for reason, rows in reasons.items()]
    return Section("Kernels on real shapes", lines, SPEED_COLUMNS, "\n".join(filter(None, [note, *missing])))


def speed_figures(result: Timed, limits: Limits, named: Mapping[str, Timed]) -> Figures:
    """The cells of a row."""
    work, seconds = result.row.work, result.seconds
    figures: dict[str, Any] = {"GB": work.moved / 1e9, "TFLOP": work.flops / 1e12}
    figures["at least us"] = work.seconds(limits) * 1e6
    if seconds is None:
        return {**figures, "us": result.problem}
    figures |= {"us": seconds * 1e6, "of copy": f"{work.moved / seconds / limits.bandwidth:.0%}"}
    if work.matrix_seconds(limits):
        figures["of matrix"] = f"{work.matrix_seconds(limits) / seconds:.0%}"
    for name, peer in (("torch", result.torch_seconds), ("ORT", result.onnxruntime_seconds)):
        if peer is not None:
            figures |= {f"{name} us": peer * 1e6, f"x {name}": f"{peer / seconds:.2f}"}
    figures["diff. to torch"] = result.difference
    return {**figures, "aim": result.problem or aim_text(aims(result, limits, named))}


def aim_text(found: Mapping[str, bool | None]) -> str:
    """Each aim and whether it is met, in words; those that the row's bytes alone rule out are called out of reach."""
    words = {True: "met", False: "NOT met", None: "out of reach, bound by memory"}
    return "; ".join(f"{name}: {words[met]}" for name, met in found.items())


def planned_section(rows: Sequence[Row], limits: Limits, memory: int | None) -> Section:
    """The rows without a GPU; those that a GPU of this memory cannot hold say so."""
    lines: Lines = []
    for row in rows:
        work, fits = row.work, memory is None or row.memory <= memory
        least = {"at least us": work.seconds(limits) * 1e6, "bound by": work.bound(limits)}
        figures = {"GB": work.moved / 1e9, "TFLOP": work.flops / 1e12, **least, "needs GB": row.memory / 1e9}
        lines.append((row.name, {**figures, "remark": "" if fits else "does not fit"}))
    return Section("Kernels on real shapes", lines)


def correctness_json(results: Sequence[Checked]) -> list[dict[str, Any]]:
    return [
        {
            "row": result.row, "cases": result.cases, "relative_error": result.error, "bound": result.bound,
            "worst_case": result.worst,
            "problem": result.problem or None, "measured": result.measured, "passed": result.passed,
        }
        for result in results
    ]  # fmt: skip


def speed_json(results: Sequence[Timed], limits: Limits) -> list[dict[str, Any]]:
    """Every row in units without prefixes: bytes, FLOPs, seconds."""
    named = {result.row.name: result for result in results}
    return [
        {
            "row": result.row.name, "bytes_read": result.row.work.read, "bytes_written": result.row.work.written,
            "flops": result.row.work.flops, "rate": result.row.work.rate, "memory_bytes": result.row.memory,
            "least_seconds": result.row.work.seconds(limits), "seconds": result.seconds,
            "torch_seconds": result.torch_seconds, "onnxruntime_seconds": result.onnxruntime_seconds,
            "difference_to_torch": result.difference, "aims": aims(result, limits, named),
            "problem": result.problem or None, "notes": list(result.notes), "passed": result.passed,
        }
        for result in results
    ]  # fmt: skip
