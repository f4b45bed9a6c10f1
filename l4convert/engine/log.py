"""A builder's log: kept as a file, and read for the few facts that are said nowhere else."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
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
        self._file = self.path.open("a", encoding="utf-8")  # native code appends to it, too (worker.py)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._lock:
            if self._file is not None:
                with suppress(OSError):  # a full disk
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


def make_logger(module: Any, log: BuildLog) -> Any:
    """An ``ILogger`` of the given module that hands every message, the verbose ones too, to ``log``."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base class is known at run time only
        """Nothing may be raised into the builder, so this does nothing that can fail."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(severity.name, message)

    return Logger()
