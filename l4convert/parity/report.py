"""Show a parity report: a table on a terminal, JUnit XML for CI systems, one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from xml.etree import ElementTree

from l4convert.parity.by_length import LengthRow
from l4convert.parity.outcome import ParityReport, SplitRow, write_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = TypeVar("Row")


@dataclass(frozen=True)
class _Column(Generic[Row]):
    title: str
    value: Callable[[Row], str]


# Of a row of either table.
_METRICS: tuple[_Column[Any], ...] = (
    _Column("max |d|", lambda row: f"{row.metrics.max_abs_logit:.2e}"),
    _Column("relative", lambda row: f"{row.metrics.max_rel_logit:.2e}"),
    _Column("mean KL", lambda row: f"{row.metrics.mean_kl:.2e}"),
    _Column("p99 KL", lambda row: f"{row.metrics.p99_kl:.2e}"),
    _Column("top-1", lambda row: f"{row.metrics.top1:.4f}"),
    _Column("ppl ref", lambda row: f"{row.metrics.ppl_reference:.3f}"),
    _Column("ppl", lambda row: f"{row.metrics.ppl_artifact:.3f}"),
)

_COLUMNS: tuple[_Column[SplitRow], ...] = (
    _Column("split", lambda row: row.name),
    _Column("calls", lambda row: f"{row.calls}"),
    _Column("tokens", lambda row: f"{row.metrics.tokens}"),
    _Column("boundaries", lambda row: f"{row.boundaries}"),
    *_METRICS,
    _Column("drift KL", lambda row: "" if row.drift is None else f"{row.drift.mean_kl:.1e}"),
    _Column("", lambda row: "pass" if row.passed else "FAIL"),
)

_LENGTH_COLUMNS: tuple[_Column[LengthRow], ...] = (
    _Column("positions", lambda row: f"{row.start:,}-{row.stop - 1:,}"),
    _Column("tokens", lambda row: f"{row.metrics.tokens}"),
    *_METRICS,
)


def headline(report: ParityReport) -> str:
    """The outcome in one line."""
    whole = report.whole
    reasons = report.failures or ("no tokens were compared",)
    more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    verdict = "passed:" if report.passed else f"FAILED: {reasons[0]}{more};"
    return (
        f"Parity {verdict} {report.artifact} ({report.recipe}, {report.target}) against {report.reference}; "
        f"mean KL {whole.mean_kl:.3g}, top-1 {whole.top1:.4f}, "
        f"perplexity {whole.ppl_artifact:.3f} for {whole.ppl_reference:.3f}"
    )


def render(report: ParityReport) -> RenderableType:
    """The report as a rich renderable."""
    from rich.console import Group
    from rich.text import Text

    table = _table(_title(report), _COLUMNS)
    for row in report.rows:
        style = None if row.passed else "red"
        table.add_row(*(Text(column.value(row)) for column in _COLUMNS), style=style)
    tables = [table]
    if len(report.by_length) > 1:  # one range would say what the first row says
        tables.append(_table("By context length", _LENGTH_COLUMNS))
        for part in report.by_length:
            tables[-1].add_row(*(Text(column.value(part)) for column in _LENGTH_COLUMNS))
    lines = [Text(f"note: {note}", style="yellow") for note in report.notes]
    lines += [Text(f"failed: {reason}", style="red") for reason in report.failures]
    return Group(*tables, *lines, Text(headline(report), style="green" if report.passed else "bold red"))


def _table(title: str, columns: Sequence[_Column[Any]]) -> Table:
    """An empty table: the first column holds text, the others numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column.title, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def write_junit(report: ParityReport, file: Path) -> None:
    """Write JUnit XML: one test case for each way of feeding the text.

    Raises:
        InputError: The file cannot be written.
    """
    rows = report.rows
    failed = sum(not row.passed for row in rows)
    counts = {"tests": str(max(len(rows), 1)), "failures": str(failed if rows else 1), "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _xml_safe(f"parity {report.artifact}"), **counts})
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _facts(report):
        ElementTree.SubElement(properties, "property", {"name": name, "value": _xml_safe(value)})
    for row in rows:
        _junit_case(suite, report, row.name, row.failures)
    if not rows:
        _junit_case(suite, report, "comparison", report.failures)
    ElementTree.indent(suites)
    write_text(file, ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n")


def _junit_case(suite: ElementTree.Element, report: ParityReport, name: str, reasons: Sequence[str]) -> None:
    names = {"name": _xml_safe(name), "classname": _xml_safe(f"parity.{report.recipe}")}
    case = ElementTree.SubElement(suite, "testcase", names)
    if reasons:
        failure = ElementTree.SubElement(case, "failure", {"message": _xml_safe(reasons[0])})
        failure.text = _xml_safe("\n".join(reasons))


def _xml_safe(text: str) -> str:
    """Without the control characters that XML 1.0 cannot hold even escaped (a folder's name may have them)."""
    return "".join(c if c in "\t\n" or ord(c) >= 32 else "\N{REPLACEMENT CHARACTER}" for c in text)


def write_html(report: ParityReport, file: Path) -> None:
    """Write one page of HTML without scripts or references to anything outside it.

    Raises:
        InputError: The file cannot be written.
    """
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _facts(report))
    rows = _html_table(_COLUMNS, [(row, _html_attributes(row)) for row in report.rows])
    lengths = _html_table(_LENGTH_COLUMNS, [(row, "") for row in report.by_length])
    by_length = f"<h2>By context length</h2>{lengths}" if len(report.by_length) > 1 else ""
    lists = _html_list("Failed", report.failures) + _html_list("Notes", report.notes)
    title, verdict = escape(_title(report)), "pass" if report.passed else "fail"
    write_text(
        file,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>"
        f'<p class="{verdict}">{escape(headline(report))}</p>{lists}'
        f"{rows}\n{by_length}<dl>{facts}</dl></body></html>\n",
    )


def _html_table(columns: Sequence[_Column[Row]], rows: Iterable[tuple[Row, str]]) -> str:
    """A table; each row with the attributes of its ``tr``."""
    head = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    body = "".join(
        f"<tr{attributes}>" + "".join(f"<td>{escape(column.value(row))}</td>" for column in columns) + "</tr>\n"
        for row, attributes in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _html_attributes(row: SplitRow) -> str:
    return f' class="{"pass" if row.passed else "fail"}" title="{escape(row.description)}"'


def _html_list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{escape(title)}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _title(report: ParityReport) -> str:
    return f"Parity of {report.artifact}"


def _facts(report: ParityReport) -> tuple[tuple[str, str], ...]:
    text = report.text
    return (
        ("artifact", report.artifact),
        ("recipe", report.recipe),
        ("target", report.target),
        ("kv_cache", report.kv_cache),
        ("reference", report.reference),
        ("text", f"{text.source}: {text.tokens} tokens in {text.windows} windows of {text.window}"),
        ("policy", report.policy.name),
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid #ccc}"
    "th:first-child,td:first-child{text-align:left}.pass td:last-child,p.pass{color:#176f2c}"
    "tr.fail,p.fail{color:#b3261e;font-weight:600}dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem}"
    "dd{margin:0}@media(prefers-color-scheme:dark){body{background:#111;color:#eee}}"
)
