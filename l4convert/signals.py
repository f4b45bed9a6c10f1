"""Signals that end a process: each becomes an exception, so that what was half-written is removed on its way out.

Such an exception may be raised between any two steps of the main thread. Where it must not, as in the middle of
starting a thread that somebody has to stop again, the signal waits until that is done.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Of the main thread: how deep it is in contexts that let signals wait, and those that do.
_holders: list[None] = []
_waiting: list[int] = []


def raise_on_signals() -> None:
    """From now on SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, in the main thread.

    The code is 128 + the number, as shells report it. A SIGINT that the process was started to ignore (``nohup``,
    ``&`` in a script) stays ignored.
    """
    signal.signal(signal.SIGTERM, _receive)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _receive)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Let signals of :func:`raise_on_signals` wait for the end of the context, which must come soon."""
    if threading.current_thread() is not threading.main_thread():  # no other one is ever interrupted
        yield
        return
    _holders.append(None)
    try:
        yield
    finally:
        _holders.pop()
        if _waiting and not _holders:
            number = _waiting[0]
            _waiting.clear()
            _raise(number)


def _receive(number: int, _frame: FrameType | None) -> None:
    if _holders:
        _waiting.append(number)
    else:
        _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
