"""A function in a process of its own: its result, its progress, its errors and its end."""

from __future__ import annotations

import os
import signal

import pytest

from l4convert.bench.process import apart
from l4convert.errors import InputError, UsageError
from l4convert.progress import Task


def work(argument: int, task: Task) -> tuple[int, int]:
    print("libraries print")  # noqa: T201
    for _ in range(argument):
        task.advance(1)
    return os.getpid(), 2 * argument


def refuse(argument: str, _task: Task) -> None:
    raise UsageError(f"not {argument}", "a hint")


def crash(number: int, _task: Task) -> None:
    os.write(2, b"the library's last words\n")
    os.kill(os.getpid(), number)


class Counter:
    def __init__(self) -> None:
        self.amount = 0.0

    def advance(self, amount: float) -> None:
        self.amount += amount

    def update(self, description: str) -> None:
        raise AssertionError(description)


def test_a_result_and_progress_come_back() -> None:
    counter = Counter()
    pid, result = apart(work, 5, counter)
    assert pid != os.getpid()
    assert (result, counter.amount) == (10, 5)


def test_an_error_comes_back_whole() -> None:
    with pytest.raises(UsageError, match="not so") as caught:
        apart(refuse, "so", Counter())
    assert caught.value.hint == "a hint"


@pytest.mark.parametrize(("number", "words"), [(signal.SIGKILL, "SIGKILL .out of memory"), (signal.SIGABRT, "SIGABRT")])
def test_a_crash_says_which_and_the_last_words(number: int, words: str) -> None:
    with pytest.raises(InputError, match=rf"was ended by {words}.*: the library's last words"):
        apart(crash, number, Counter())
