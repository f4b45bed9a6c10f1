from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from l4convert.errors import InputError
from l4convert.parity.by_length import LengthRow
from l4convert.parity.metrics import Comparison
from l4convert.parity.outcome import ParityReport, SplitRow, TextUsed, write_report
from l4convert.parity.policy import default_policy
from l4convert.parity.report import headline, render, write_html, write_junit
from tests.parity.test_policy import GOOD

HOSTILE = "<b>&\"'\x07</b>"


def row(name: str, *failures: str) -> SplitRow:
    return SplitRow(name, f"about {name}", 3, 2, GOOD, None if name == "one call" else GOOD, failures)


def make(*rows: SplitRow) -> ParityReport:
    return ParityReport(
        artifact=HOSTILE,
        reference="transformers",
        recipe="int4",
        target="cpu",
        kv_cache="static",
        text=TextUsed(HOSTILE, random=False, tokens=3000, windows=3, window=1000),
        policy=default_policy("int4", (), "cpu"),
        rows=rows,
        notes=("a note",),
    )


PASSED = make(row("one call"), row("odd splits"))
FAILED = make(row("one call"), row("odd splits", "mean_kl is 9", f"second {HOSTILE}"))
EMPTY = dataclasses.replace(
    make(row("one call")), rows=(dataclasses.replace(row("one call"), metrics=Comparison().result()),)
)


def text_of(report: ParityReport) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115  # rich closes it
    console.print(render(report))
    return console.export_text()


def test_the_table_has_a_row_for_each_split_and_every_reason() -> None:
    text = text_of(FAILED)
    for expected in (
        "one call",
        "odd splits",
        "FAIL",
        "mean_kl is 9",
        "a note",
        "FAILED: odd splits: mean_kl is 9 and 1 more",
    ):
        assert expected in text
    assert "FAIL" not in text_of(PASSED)
    assert "Parity passed" in text_of(PASSED)


def test_rich_markup_in_names_is_text() -> None:
    assert "[red]x" in text_of(dataclasses.replace(PASSED, artifact="[red]x"))


def test_a_report_of_nothing_can_be_shown() -> None:
    assert "FAIL" in text_of(EMPTY)
    assert "nan" in headline(EMPTY)
    assert "no tokens were compared" in headline(EMPTY)


def test_json_is_strict_and_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    for report in (PASSED, FAILED, EMPTY):
        write_report(report, file)
        content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert content["passed"] is report.passed
        assert content["failures"] == list(report.failures)
    assert [path.name for path in tmp_path.iterdir()] == ["parity.json"]


def test_what_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_report(PASSED, tmp_path / "absent" / "parity.json")


def test_junit_has_a_case_for_each_row(tmp_path: Path) -> None:
    write_junit(FAILED, tmp_path / "junit.xml")
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suites.attrib == {"tests": "2", "failures": "1", "errors": "0"}
    cases = suites.findall("testsuite/testcase")
    assert [case.get("name") for case in cases] == ["one call", "odd splits"]
    failure = cases[1].find("failure")
    assert cases[0].find("failure") is None
    assert failure is not None
    assert failure.get("message") == "mean_kl is 9"
    assert "<b>&" in str(failure.text)


def test_junit_of_no_rows_is_a_failure(tmp_path: Path) -> None:
    write_junit(make(), tmp_path / "junit.xml")
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suites.get("failures") == "1"
    assert suites.find("testsuite/testcase/failure") is not None


def test_html_is_one_escaped_page(tmp_path: Path) -> None:
    write_html(FAILED, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;&quot;" in page
    for outside in ("http", "<script", "src=", "<link"):
        assert outside not in page
    assert "mean_kl is 9" in page
    assert page.count("<tr ") == 2


BY_LENGTH = dataclasses.replace(PASSED, by_length=(LengthRow(0, 256, GOOD), LengthRow(256, 1000, GOOD)))


def test_measures_by_context_length_are_shown_where_there_is_more_than_one_range(tmp_path: Path) -> None:
    assert "256-999" in text_of(BY_LENGTH)
    write_html(BY_LENGTH, tmp_path / "report.html")
    assert "<td>256-999</td>" in (tmp_path / "report.html").read_text()
    single = dataclasses.replace(PASSED, by_length=BY_LENGTH.by_length[:1])
    assert "By context length" not in text_of(single)
    write_html(single, tmp_path / "report.html")
    assert "By context length" not in (tmp_path / "report.html").read_text()
    assert [(row["from"], row["to"]) for row in single.to_json()["by_length"]] == [(0, 256)]
