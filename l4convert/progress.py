"""How long work tells its user how far it is: a small protocol, a silent implementation and one drawn with rich.

Library functions take ``progress: Progress = NO_PROGRESS`` and never print; only the command line passes another one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from l4convert.signals import signals_wait

if TYPE_CHECKING:
    import rich.console
    import rich.progress


class Task(Protocol):
    """One running piece of work. Both methods may be called from any thread."""

    def advance(self, amount: float) -> None:
        """``amount`` more units are done."""

    def update(self, description: str) -> None:
        """Replace the text shown beside the bar."""


class Progress(Protocol):
    """Where work reports to. Tasks may nest and overlap."""

    def task(self, description: str, total: float | None = None, unit: str = "B") -> AbstractContextManager[Task]:
        """Show a task while the context lasts.

        Args:
            description: What is being done, as "Writing weights".
            total: How many units there are; None where that is not known.
            unit: "B" for bytes (shown as MB, GB, with a rate and the time left), else a plural noun ("tokens").
        """


class _SilentTask:
    def advance(self, amount: float) -> None:
        pass

    def update(self, description: str) -> None:
        pass


class _Silent:
    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "B") -> Iterator[Task]:
        yield _SilentTask()


NO_PROGRESS: Progress = _Silent()


class _RichTask:
    def __init__(self, bars: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: float) -> None:
        self._bars.advance(self._task, amount)

    def update(self, description: str) -> None:
        self._bars.update(self._task, description=description)


class RichProgress:
    """Bars on a terminal; the display lives while at least one task does, so nothing is drawn between phases."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._running = 0
        self._bars: rich.progress.Progress | None = None

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "B") -> Iterator[Task]:
        """See :meth:`Progress.task`."""
        with signals_wait():
            bars = self._enter()
        task = bars.add_task(description, total=total, unit=unit)
        try:
            yield _RichTask(bars, task)
        finally:
            self._leave()

    def _enter(self) -> rich.progress.Progress:
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            self._running += 1
            return self._bars

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def terminal_progress() -> Progress:
    """Bars on stderr where that is a terminal, silence where it is not (a pipe, a log file, CI)."""
    if not sys.stderr.isatty():
        return NO_PROGRESS
    from rich.console import Console

    return RichProgress(Console(stderr=True))


def format_amount(amount: float, unit: str) -> str:
    """``1234567.0, "B"`` as ``1.2 MB`` (powers of 1000, as disks are sold); other units as ``1,234,567 tokens``."""
    if unit != "B":
        return f"{amount:,.0f} {unit}"
    scaled, prefixes = float(amount), ["", "k", "M", "G", "T"]
    while abs(scaled) >= 999.5 and len(prefixes) > 1:
        scaled /= 1000
        prefixes.pop(0)
    return f"{scaled:.1f} {prefixes[0]}B" if prefixes[0] else f"{scaled:.0f} B"


def _bars(console: rich.console.Console) -> rich.progress.Progress:
    from rich import progress as bars
    from rich.table import Column
    from rich.text import Text

    class Amount(bars.ProgressColumn):
        """Done, of how many, and how many a second."""

        def render(self, task: bars.Task) -> Text:
            unit = str(task.fields["unit"])
            done = format_amount(task.completed, unit)
            of = "" if task.total is None else f" of {format_amount(task.total, unit)}"
            speed = task.finished_speed or task.speed
            rate = "" if speed is None else f", {format_amount(speed, unit)}/s"
            return Text(done + of + rate)

    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=16),  # with the numbers, one line of 80 columns
        bars.TaskProgressColumn(),
        Amount(table_column=Column(no_wrap=True)),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
