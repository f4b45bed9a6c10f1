"""Progress: silent off a terminal, rates and totals on one, nesting and threads."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from l4convert.progress import NO_PROGRESS, RichProgress, format_amount, terminal_progress


def _console() -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=True, width=140, color_system=None), screen


def test_silent_progress_accepts_everything(capfd: pytest.CaptureFixture[str]) -> None:
    with NO_PROGRESS.task("Writing", total=None) as task:
        task.advance(3)
        task.update("Still writing")
    assert capfd.readouterr() == ("", "")


def test_terminal_progress_is_silent_when_stderr_is_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert terminal_progress() is NO_PROGRESS


def test_terminal_progress_draws_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal_progress().task("Reading", total=10) as task:
        task.advance(10)
    assert "Reading" in screen.getvalue()


def test_bars_show_bytes_rate_and_new_description() -> None:
    console, screen = _console()
    with RichProgress(console).task("Writing weights", total=4_000_000) as task:
        task.advance(1_000_000)
        task.advance(3_000_000)
        task.update("Writing lm_head")
    text = screen.getvalue()
    for part in ("4.0 MB of 4.0 MB", "/s", "Writing lm_head", "100%"):
        assert part in text


def test_nested_tasks_share_one_display_and_a_new_one_starts_afterwards() -> None:
    console, screen = _console()
    progress = RichProgress(console)
    with progress.task("Outer", total=2, unit="passes") as outer, progress.task("Inner", total=5) as inner:
        inner.advance(5)
        outer.advance(1)
    assert "1 passes of 2 passes" in screen.getvalue()
    with progress.task("Later") as task:
        task.advance(12)
    assert "Later" in screen.getvalue()
    assert "12 B" in screen.getvalue()


def test_tasks_advance_from_many_threads() -> None:
    console, screen = _console()
    with RichProgress(console).task("Threads", total=4000, unit="items") as task:

        def work() -> None:
            for _ in range(1000):
                task.advance(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "4,000 items of 4,000 items" in screen.getvalue()


def test_the_display_stops_when_the_work_fails() -> None:
    console, screen = _console()
    with pytest.raises(RuntimeError), RichProgress(console).task("Failing"):
        raise RuntimeError
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (0, "B", "0 B"),
        (999, "B", "999 B"),
        (1234, "B", "1.2 kB"),
        (999_999, "B", "1.0 MB"),
        (62_500_000_000, "B", "62.5 GB"),
        (4_100_000_000_000, "B", "4.1 TB"),
        (1234567, "tokens", "1,234,567 tokens"),
    ],
)
def test_format_amount(amount: float, unit: str, text: str) -> None:
    assert format_amount(amount, unit) == text
