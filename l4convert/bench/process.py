"""Run a function in a process of its own: its peak memory is its own, and gone when it ends."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any, TypeVar

from l4convert.errors import InputError, L4Error
from l4convert.progress import Task

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_PROGRAM = "from l4convert.bench.process import main; main()"


def apart(function: Callable[[Argument, Task], Result], argument: Argument, task: Task) -> Result:
    """Call a function of a module with one argument, in a new process; both are pickled, and so is the result.

    Args:
        function: Takes the argument, and a task that it reports progress to.
        argument: For it.
        task: Is told of that progress.

    Raises:
        L4Error: What the function raised; InputError where the process ended without an answer.
    """
    # Its messages: libraries that print or warn do not reach the user's terminal, but the end of a crash does.
    with tempfile.TemporaryFile() as said:
        worker = subprocess.Popen(  # noqa: S603  # this Python, on our own module
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with worker.stdout as answers:
                try:
                    with worker.stdin as pipe:
                        pickle.dump((function, argument), pipe)
                except BrokenPipeError:
                    pass  # it ended at once, which is told below
                kind, value = _follow(answers, task)
            code = worker.wait() if kind == "nothing" else 0
        finally:
            worker.kill()
            worker.wait()
        if kind == "error":
            raise value
        if kind == "nothing":
            raise InputError(f"the process that measures {_ending(code)}: {_last_line(said)}")
    result: Result = value
    return result


def _follow(answers: IO[bytes], task: Task) -> tuple[str, Any]:
    """Pass progress on until there is a result, an error, or nothing more."""
    while True:
        try:
            kind, value = pickle.load(answers)  # noqa: S301  # from our own child
        except (EOFError, pickle.UnpicklingError):
            return "nothing", None
        if kind == "advance":
            task.advance(value)
        elif kind == "update":
            task.update(value)
        else:
            return kind, value


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
    return f"was ended by {name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][-240:] if lines else "it said nothing"


class _Teller:
    """The task of the child: tells the parent. It is told of every step, so it is also what notices that it is gone."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "wb")

    def send(self, kind: str, value: Any) -> None:
        pickle.dump((kind, value), self._pipe)
        self._pipe.flush()

    def advance(self, amount: float) -> None:
        self.send("advance", amount)

    def update(self, description: str) -> None:
        self.send("update", description)


def main() -> None:
    """What the new process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    function, argument = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    teller = _Teller(os.dup(1))
    os.dup2(2, 1)  # what libraries print must not come between the messages
    try:
        teller.send("result", function(argument, teller))
    except L4Error as error:
        teller.send("error", error)
    except MemoryError:
        teller.send("error", InputError("the process that measures ran out of memory", "ask for shorter contexts"))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone: there is nobody to tell
