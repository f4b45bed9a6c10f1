"""Files of plots: their format by their ending, the same bytes each time, whole or not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from l4convert.bench.figure import draw_report
from l4convert.bench.plot import check_plot_file, draw
from l4convert.bench.results import KINDS, BenchReport, Breakdown, Curve, Point, Prefill, growth
from l4convert.errors import BackendMissing, InputError, UsageError


def curve(name: str, synthetic: bool = False, profiled: bool = True) -> Curve:
    points = []
    for context in (1024, 4096):
        parts = dict.fromkeys(KINDS, 1.0) | {"global attention": context / 1024}
        points.append(
            Point(
                context=context,
                prefill=None if synthetic else Prefill(context, context / 100, context, context / 100),
                decode_ms=(3.0, 1.0, 2.0),
                cache_bytes={"global": context, "chunked": 10},
                cache_used_bytes=None,
                peak_rss=10**8,
                breakdown=Breakdown(3, sum(parts.values()), parts) if profiled else None,
            )
        )
    return Curve(name, "float32", "static", tuple(points))


def report(**options: bool) -> BenchReport:
    return BenchReport(curve("ours", **options), curve("theirs", profiled=False), {"recipe": "int4"})


@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("profiled", [False, True])
def test_svg_is_the_same_each_time_and_has_the_words(tmp_path: Path, synthetic: bool, profiled: bool) -> None:
    for name in ("a.svg", "b.SVG"):
        draw_report(report(synthetic=synthetic, profiled=profiled), tmp_path / name)
    content = (tmp_path / "a.svg").read_bytes()
    assert content == (tmp_path / "b.SVG").read_bytes()
    words = "".join(ElementTree.fromstring(content).itertext())
    assert ("global attention" in words) == profiled
    assert "transformers: float32" in words
    assert "4k" in words
    assert b"<dc:date>" not in content
    assert not any(line.endswith(b" ") for line in content.splitlines())


def test_png(tmp_path: Path) -> None:
    draw_report(report(), tmp_path / "a.png")
    draw_report(report(), tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["plot", "plot.pdf", "plot.svg.txt"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"plot.*: a plot with (no ending|the ending \.(pdf|txt))"):
        check_plot_file(tmp_path / name)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        check_plot_file(tmp_path / "nowhere" / "plot.svg")


def test_without_matplotlib_the_message_is_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendMissing, match="matplotlib is not installed: pip install matplotlib"):
        check_plot_file(tmp_path / "plot.svg")


def test_nothing_is_left_where_drawing_fails(tmp_path: Path) -> None:
    def fail(panels: list[Any]) -> None:
        raise RuntimeError("no")

    (tmp_path / "plot.svg").write_text("before")
    with pytest.raises(RuntimeError):
        draw(tmp_path / "plot.svg", (1, 1), (1, 1), fail)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InputError, match=r"taken\.png: cannot be written"):
        draw_report(report(), tmp_path / "taken.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.svg", "taken.png"]
    assert (tmp_path / "plot.svg").read_text() == "before"


def test_growth_is_the_difference_of_the_ends() -> None:
    found = growth(curve("ours"))
    assert found is not None
    assert (found.shortest, found.longest, found.total_ms) == (1024, 4096, 3.0)
    assert found.parts_ms == dict.fromkeys(KINDS, 0.0) | {"global attention": 3.0}
    assert found.global_attention == 1.0
    assert growth(curve("ours", profiled=False)) is None
