from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from l4convert.emit import write_artifact
from l4convert.signals import raise_on_signals, signals_wait
from tests.emit.models import Weight, holder, values

SIGNALS = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    raise_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@SIGNALS
def test_a_signal_is_raised(number: signal.Signals, raised: type[BaseException]) -> None:
    with pytest.raises(raised) as error:
        send(number)
    assert number == signal.SIGINT or error.value.args == (128 + signal.SIGTERM,)


@SIGNALS
def test_a_signal_waits_for_the_outermost_end(number: signal.Signals, raised: type[BaseException]) -> None:
    reached = []

    def nested() -> None:
        with signals_wait():
            with signals_wait():
                send(number)
                send(signal.SIGTERM)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(raised):
        nested()
    assert reached == ["inner", "outer"]
    with signals_wait():  # and it was raised once
        pass


def test_another_thread_holds_nothing_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with signals_wait():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)
    finally:
        leave.set()
        thread.join()


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_on_signals()
    send(signal.SIGINT)


@pytest.mark.parametrize("thread", ["digest", "journal", "fill_0"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_while_a_thread_starts_ends_the_writing(
    thread: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At either end of the start of each thread that writing has; none is left behind."""
    start: Callable[[threading.Thread], None] = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        for moment in ("before", "after"):
            if self.name == thread and when == moment:
                send(signal.SIGTERM)
            if moment == "before":
                start(self)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    weight = Weight(values(ir.DataType.FLOAT16, (4, 8)))
    with pytest.raises(SystemExit):
        write_artifact(holder({"w": weight}), tmp_path / "out", manifest={})
    assert not [one.name for one in threading.enumerate() if one.name.startswith(("digest", "journal", "fill"))]
    assert not (tmp_path / "out").exists()
