"""A plan on its way to the disk: streamed, digested, and in place only when it is whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4convert.emit.engines import PARTIAL_SUFFIX
from l4convert.emit.staging import reported, sync
from l4convert.errors import UsageError


class PlanWriter:
    """Where a builder's output goes: an open file.

    Attributes:
        error: What kept a block from being written; the builder must not see it raised, so the caller asks afterwards.
        size: Bytes so far.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self.size = 0
        self._descriptor = descriptor
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Append a block; after the first failure only counts as written. Returns the block's length."""
        if self.error is None:
            try:
                view = memoryview(data).cast("B")
                self._digest.update(view)
                self.size += len(view)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError as error:
                self.error = error
        return len(data)


@contextmanager
def plan_file(path: Path) -> Iterator[int]:
    """A locked, empty temporary file beside ``path``, open for writing.

    It is removed when the block ends, unless :func:`publish` put it in place.

    Raises:
        UsageError: Another process, here or on another machine, is building the same engine.
        InputError: The folder cannot be written to.
    """
    partial = partial_path(path)
    with reported(f"{partial}: cannot be written"):
        descriptor = _lock(partial, path)
    try:
        os.ftruncate(descriptor, 0)  # what a killed build left
        yield descriptor
    finally:
        if partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor)):
            partial.unlink(missing_ok=True)
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """The temporary file of a plan."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def publish(path: Path) -> None:
    """Put the temporary file of ``path`` in place, after its bytes have reached the disk.

    Raises:
        OSError: The disk failed.
    """
    partial = partial_path(path)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _lock(partial: Path, path: Path) -> int:
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"{path}: is being built by another process", "wait for it, or end it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def make_writer(module: Any, plan: PlanWriter) -> Any:
    """An ``IStreamWriter`` of the given module that appends to ``plan``."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]  # the base class is known at run time only
        """Takes blocks of up to 64 MiB."""

        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return plan.write(data)

    return Writer()
