"""Shards that end early, late, or were replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.hostile.bases import sharded
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import FIRST, INDEX, SECOND, cut, folder_instead, link, pipe, remove, sparse, text


def keep(part: float) -> Callable[[Path], None]:
    """Keep that part of the second shard."""
    return lambda folder: os.truncate(folder / SECOND, int((folder / SECOND).stat().st_size * part))


def lengths() -> dict[str, tuple[Damage, tuple[str, ...]]]:
    """The second shard after so many bytes."""
    words = {0: "not a safetensors file", 1: "not a safetensors file", 7: "not a safetensors file", 8: "truncated"}
    return {f"after {length} bytes": (cut(SECOND, length), (SECOND, what)) for length, what in words.items()}


def swapped(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


FAMILY = Family(
    base=sharded,
    cases=cases(
        {
            "one byte missing": (cut(SECOND, -1), (SECOND, "1 bytes missing")),
            **lengths(),
            "inside the header": (cut(SECOND, 100), (SECOND, "truncated inside the header")),
            **{f"{part:.0%} left": (keep(part), (SECOND, "truncated")) for part in (0.02, 0.25, 0.5, 0.75, 0.9, 0.99)},
            "first shard cut": (cut(FIRST, -4096), (FIRST, "truncated, 4,096 bytes missing")),
            "both cut": (lambda p: (cut(FIRST, -2)(p), cut(SECOND, -3)(p)), (FIRST, "2 bytes missing")),
            "one byte more": (lambda p: cut(SECOND, (p / SECOND).stat().st_size + 1)(p), (SECOND, "1 bytes after")),
            "a terabyte of zeros more": (cut(SECOND, 1 << 40), (SECOND, "bytes after")),
            "a terabyte of zeros": (sparse(SECOND, 1 << 40), (SECOND, "not valid JSON")),
            "twice in a row": (
                lambda p: (p / SECOND).write_bytes((p / SECOND).read_bytes() * 2),
                (SECOND, "bytes after"),
            ),
            "the other shard's content": (
                lambda p: (p / SECOND).write_bytes((p / FIRST).read_bytes()),
                (SECOND, "also in"),
            ),
            "swapped": (swapped, ("is missing", INDEX)),
            "absent": (remove(SECOND), (SECOND, "absent")),
            "a folder": (folder_instead(SECOND), (SECOND,)),
            "a pipe": (pipe(SECOND), (SECOND,)),
            "a device": (link(SECOND, "/dev/zero"), (SECOND,)),
            "a dangling link": (link(SECOND, "gone"), (SECOND,)),
            "a link to itself": (link(SECOND, SECOND), (SECOND,)),
            "a pointer": (text(SECOND, "version https://git-lfs.github.com/spec/v1\noid x"), (SECOND, "git lfs pull")),
            "an error page": (text(SECOND, "<!DOCTYPE html><html>404</html>"), (SECOND,)),
        }
    ),
)
