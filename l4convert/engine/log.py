"""A builder's log: kept as a file, and read for the few facts that are said nowhere else."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

# Said by builders on machines without a GPU or driver (CUDA's error 35 and 100); it does not keep them from building.
_HARMLESS = re.compile(r"cudaError (35|100)\b|CUDA (driver|initialization|lazy loading)", re.IGNORECASE)
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
_ERRORS = {"INTERNAL_ERROR", "ERROR"}


class BuildLog:
    """Writes every message to a file, one line each; may be called from any thread.

    Attributes:
        errors: Messages that say why a build failed, oldest first.
        scratch_bytes: Working memory of each optimization profile, as the builder planned it.
        weights_bytes: Bytes of weights in the engine.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: list[str] = []
        self.scratch_bytes: list[int] = []
        self.weights_bytes = 0
        self._lock = threading.Lock()
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._file = self.path.open("a", encoding="utf-8")  # not the only writer: see native_output
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def add(self, severity: str, message: str) -> None:
        """Take one message; a disk that is full loses log lines, not the build."""
        with self._lock:
            if self._file is not None:
                try:
                    self._file.write(f"{severity}: {message}\n")
                except (OSError, ValueError):
                    self._file = None
            if severity in _ERRORS and not _HARMLESS.search(message):
                self.errors.append(" ".join(message.split()))
            elif found := _SCRATCH.match(message):
                self.scratch_bytes.append(int(found[1]))
            elif found := _WEIGHTS.match(message):
                self.weights_bytes = max(self.weights_bytes, int(found[1]))

    def reason(self) -> str:
        """The first error, which is the cause of the others, in one line of sensible length."""
        text = self.errors[0] if self.errors else "no reason given"
        return text if len(text) <= 400 else f"{text[:397]}..."


@contextmanager
def native_output(path: Path) -> Iterator[None]:
    """Let what native code prints go to the end of a file while the context lasts.

    TensorRT's compiler prints thousands of lines of its program where it fails, past its logger: they belong into the
    log, not between the results on stdout. Python's own output (progress bars) still goes where it went.
    """
    streams = {1: sys.stdout, 2: sys.stderr}
    saved = {number: os.dup(number) for number in streams}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number, stream in streams.items():
            stream.flush()
            os.dup2(target, number)
        with ExitStack() as stack:
            for number, name in ((1, "stdout"), (2, "stderr")):
                if _descriptor(streams[number]) == number:
                    replacement = stack.enter_context(os.fdopen(os.dup(saved[number]), "w", buffering=1))
                    stack.callback(setattr, sys, name, streams[number])
                    setattr(sys, name, replacement)
            yield
    finally:
        for number, descriptor in saved.items():
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(target)


def _descriptor(stream: IO[str]) -> int:
    """A stream's file descriptor, -1 where it has none (a test's, a notebook's)."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return -1


def make_logger(module: Any, log: BuildLog) -> Any:
    """An ``ILogger`` of the given module that hands every message, the verbose ones too, to ``log``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        """Nothing may be raised into the builder, so this does nothing that can fail."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()
