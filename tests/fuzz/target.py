"""What a fuzz target is: a parser, seeds to start from, and words that help to get past its first checks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from l4convert.errors import MAX_CHARACTERS, L4Error


@dataclass(frozen=True)
class Target:
    """One parser under test.

    Attributes:
        parse: Given the input, returns anything or raises an L4Error; all else is a finding.
        seeds: Valid inputs.
        words: For libFuzzer's dictionary.
        form: "json": half of the mutations change a value of the parsed text rather than its bytes.
        longest: Of an input, in bytes.
    """

    parse: Callable[[bytes], object]
    seeds: Callable[[], Sequence[bytes]]
    words: Sequence[str | bytes] = ()
    form: Literal["bytes", "json"] = "bytes"
    longest: int = 16384


def check(parse: Callable[[bytes], object], data: bytes) -> None:
    """Run a parser; an error of ours must be fit to be shown.

    Raises:
        AssertionError: Its message is not one printable line of a sensible length.
    """
    try:
        parse(data)
    except L4Error as error:
        for line in (error.message, error.hint or ""):
            assert line.isprintable(), f"not printable: {line!r}"
            assert len(line) <= MAX_CHARACTERS, f"a message of {len(line)} characters"


def folder_in_memory() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed with the object; in memory where there is a file system for that."""
    shared = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="l4fuzz-", dir=shared if shared.is_dir() else None)


class OneFile:
    """A file that takes one input after the other."""

    def __init__(self, name: str) -> None:
        self._folder = folder_in_memory()
        self.path = Path(self._folder.name) / name

    def __call__(self, data: bytes) -> Path:
        self.path.write_bytes(data)
        return self.path
