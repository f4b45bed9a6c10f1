"""Archives that lie about sizes and places, or would unpack to more than there is room for."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.case import Damage, Family, cases
from tests.hostile.meta_base import PTH, meta_checkpoint, pickle, storages, zipped
from tests.hostile.torch_files import Entry, archive, changed, torch_entries

ZEROS = 100_000_000
PKL = "archive/data.pkl"


def bad(change: Callable[[list[Entry]], Sequence[Entry]], **ends: Any) -> tuple[Damage, tuple[str, ...]]:
    return zipped(change, **ends), (PTH,)


def one(suffix: str, **values: Any) -> tuple[Damage, tuple[str, ...]]:
    """Other fields for one entry, which the line must name."""
    return zipped(lambda entries: changed(entries, suffix, **values)), (PTH, suffix)


def packed(method: int, squeeze: Callable[[bytes], bytes], unpacked: int = ZEROS) -> tuple[Damage, tuple[str, ...]]:
    """The first storage compressed, so small that it takes a thousandth of what it unpacks to."""

    def damage(folder: Path) -> None:
        entries = changed(
            torch_entries(pickle(), storages()), "data/0", data=squeeze(bytes(unpacked)), method=method, size=unpacked
        )
        (folder / PTH).write_bytes(archive(entries))

    return damage, (PTH, "data/0", "compressed")


def deflate(data: bytes) -> bytes:
    squeezer = zlib.compressobj(9, wbits=-15)
    return squeezer.compress(data) + squeezer.flush()


def raw(change: Callable[[bytes], bytes]) -> tuple[Damage, tuple[str, ...]]:
    """Change the file's bytes."""
    return (lambda folder: (folder / PTH).write_bytes(change((folder / PTH).read_bytes()))), (PTH,)


def poke(place: int, value: bytes) -> tuple[Damage, tuple[str, ...]]:
    """Other bytes at a place, from the end where it is negative: the end record has 22."""

    def change(content: bytes) -> bytes:
        start = place % len(content)
        return content[:start] + value + content[start + len(value) :]

    return raw(change)


def nested(entries: list[Entry]) -> list[Entry]:
    """An archive in an archive."""
    return [*entries, Entry("archive/inner.zip", archive(entries))]


FAMILY = Family(
    base=meta_checkpoint,
    cases=cases(
        {
            "deflated to a thousandth": packed(8, deflate),
            "by bzip2": packed(12, bz2.compress, 10_000_000),
            "by LZMA": packed(14, lzma.compress, 10_000_000),
            "by an unknown method": packed(99, lambda data: data[:100], 1000),
            "the pickle deflated": one("data.pkl", data=deflate(pickle() + bytes(ZEROS)), method=8, size=ZEROS),
            "entries that overlap": bad(lambda e: [*e, Entry("archive/data/999", e[0].data, offset=0)]),
            "a quine: an entry that holds itself": bad(lambda e: [*e, Entry("archive/data/999", e[0].data, offset=30)]),
            "10,000 entries over the same bytes": bad(
                lambda e: [*e, *(Entry(f"archive/data/{i}", e[0].data, offset=0) for i in range(100, 10_100))]
            ),
            "100,000 entries": bad(lambda e: [*e, *(Entry(f"archive/data/{i}", b"") for i in range(100, 100_100))]),
            "one entry 65,000 times": bad(lambda e: changed(e, "data/0", listed=65_000)),
            "nested": bad(nested),
            "encrypted": one("data/0", flags=1),
            "a strange flag": one("data/0", flags=0x40),
            "masked headers": one("data.pkl", flags=0x2000),
            "sizes that follow, and do not": one("data/0", flags=8),
            "a size larger than there is": one("data/0", size=1 << 31, packed=1 << 31),
            "a size of 4 GB": one("data/0", size=0xFFFFFFFE, packed=0xFFFFFFFE),
            "a size of zero": bad(lambda e: changed(e, "data/0", size=0, packed=0)),
            "stored, of two sizes": one("data/0", packed=10),
            "zip64 sizes without the field": one("data/0", size=0xFFFFFFFF, packed=0xFFFFFFFF),
            "a zip64 field that is cut": one(
                "data/0", size=0xFFFFFFFF, packed=0xFFFFFFFF, extra=b"\x01\x00\x04\x00\0\0"
            ),
            "a zip64 size of 2**63": one(
                "data/0",
                size=0xFFFFFFFF,
                packed=0xFFFFFFFF,
                extra=b"\x01\x00\x10\x00" + b"\xff" * 7 + b"\x7f" + b"\xff" * 8,
            ),
            "two zip64 fields": one("data/0", extra=b"\x01\x00\x00\x00" * 2),
            "extra fields that are cut": one("data/0", extra=b"\x01"),
            "another CRC in front": one("data.pkl", crc=0xDEADBEEF, local_size=7),
            "another name in front": one("data.pkl", local_name="archive/date.pkl"),
            "another size in front": one("data/1", local_size=5),
            "a comment of an entry": one("data/0", comment=b"x"),
            "a comment of the archive": bad(lambda e: e, comment=b"PK\x05\x06" + bytes(18)),
            "a name that is absolute": bad(lambda e: [*e, Entry("/etc/passwd", b"x")]),
            "a name that leads out": bad(lambda e: [*e, Entry("archive/../../outside/x", b"x")]),
            "a name with NUL": bad(lambda e: [*e, Entry("archive/data/1\0.pkl", b"x")]),
            "a name of two lines": bad(lambda e: [*e, Entry("archive/data/1\n", b"x")]),
            "a name of 60,000 characters": bad(lambda e: [*e, Entry("archive/" + "x" * 60_000, b"x")]),
            "a name that is not ASCII": bad(lambda e: [*e, Entry("archive/d\u00e4ta", b"x")]),
            "an empty name": bad(lambda e: [*e, Entry("", b"x")]),
            "the same name twice": bad(lambda e: [*e, e[3]]),
            "bytes between entries": bad(lambda e: changed(e, "data/3", gap=b"hidden")),
            "bytes before the first": bad(lambda e: changed(e, "data.pkl", gap=b"hidden")),
            "a program before it": bad(lambda e: e, before=b"#!/bin/sh\ntouch canary\n"),
            "bytes after it": bad(lambda e: e, after=b"PK"),
            "no entries": bad(lambda e: []),
            "fewer entries than it says": bad(lambda e: e, count=1000),
            "more entries than it says": bad(lambda e: e, count=3),
            "no pickle": bad(lambda e: e[1:]),
            "half of it": raw(lambda content: content[: len(content) // 2]),
            "one byte less": raw(lambda content: content[:-1]),
            "only an end": raw(lambda content: b"PK\x05\x06" + bytes(18)),
            "only a beginning": raw(lambda content: content[:30]),
            "empty": raw(lambda content: b""),
            "a directory beyond the file": poke(-6, b"\xff\xff\xff\x7f"),
            "a directory at 0": poke(-6, bytes(4)),
            "a directory of 2 GB": poke(-10, b"\xff\xff\xff\x7f"),
            "several disks": poke(-18, b"\x01\x00"),
            "a Git LFS pointer": raw(lambda content: b"version https://git-lfs.github.com/spec/v1\n"),
        }
    ),
)
