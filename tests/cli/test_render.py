from __future__ import annotations

import pytest

from l4convert.cli._render import count, fields, ranges, size, table


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], "none"),
        ([5], "5"),
        ([0, 1, 2, 4, 5, 6], "0-2, 4-6"),
        ([3, 7], "3, 7"),
        ([3, 7, 11, 15], "3, 7, ..., 15"),
        (list(range(48)), "0-47"),
    ],
)
def test_ranges(indices, text):
    assert ranges(indices) == text


def test_table_aligns_and_leaves_no_trailing_blanks():
    assert table(["name", "n"], [("a", 5), ("longer", 1000)], right=[1]) == (
        "name       n\n------  ----\na          5\nlonger  1000"
    )
    assert not any(line.endswith(" ") for line in table(["a", "b"], [("x", ""), ("y", "z")]).splitlines())


def test_fields_aligns_values():
    assert fields([("a", 1), ("long", 2)]) == "a     1\nlong  2"


def test_short_numbers():
    assert [count(n) for n in (999, 16.5e6, 109e9, 2e12)] == ["999", "16.5 M", "109 B", "2.0 T"]
    assert size(33_100_000) == "33.1 MB"
