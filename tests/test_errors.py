from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4convert.errors import MAX_CHARACTERS, InputError, one_line

PRINTABLE = st.characters(exclude_categories=("C", "Z"))


@given(st.text(max_size=3 * MAX_CHARACTERS))
def test_any_text_becomes_a_short_printable_line(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= MAX_CHARACTERS
    assert one_line(line) == line


@given(st.lists(st.text(PRINTABLE, min_size=1), min_size=1, max_size=5))
def test_a_short_printable_line_stays(words: list[str]) -> None:
    line = " ".join(words)
    assert one_line(line) == line


def test_of_a_long_line_both_ends_are_shown() -> None:
    line = one_line(f"config.json: {'x' * 5000} is too long")
    assert len(line) == MAX_CHARACTERS
    assert line.startswith("config.json: xxx")
    assert line.endswith("xxx is too long")


def test_an_error_shows_what_cannot_be_printed() -> None:
    error = InputError("a\nb\x1b[31m\ud800", "c\r\n\x00d")
    assert (error.message, error.hint, str(error)) == ("a b\\x1b[31m\\ud800", "c \\x00d", error.message)
