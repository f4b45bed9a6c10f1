"""Zip archives: those of torch.save and of Python's zipfile are read, what readers disagree on is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l4convert.checkpoint.zip_directory import ZipEntry, read_directory
from l4convert.errors import InputError
from tests.checkpoint.refusals import assert_refused

CONTENT = {"a/data.pkl": b"\x80\x02}.", "a/data/0": b"x" * 100, "a/version": b"3\n"}


def directory(data: bytes) -> dict[str, ZipEntry]:
    return read_directory(io.BytesIO(data), len(data), "file.pth")


def archive(content: dict[str, bytes] = CONTENT, method: int = zipfile.ZIP_STORED, zip64: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in content.items():
            with file.open(name, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return out.getvalue()


@pytest.mark.parametrize("zip64", [False, True])
def test_entries_are_where_zipfile_wrote_them(zip64: bool) -> None:
    data = archive(zip64=zip64)
    found = directory(data)
    assert {name: data[e.offset : e.offset + e.size] for name, e in found.items()} == CONTENT
    assert [e.crc for e in found.values()] == [i.CRC for i in zipfile.ZipFile(io.BytesIO(data)).infolist()]


@pytest.mark.parametrize("crc", [True, False])
def test_entries_are_where_torch_wrote_them(tmp_path: Path, crc: bool) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(crc)
    try:
        torch.save({"a": torch.arange(100), "b": torch.zeros(0)}, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    data = (tmp_path / "x.pth").read_bytes()
    theirs = zipfile.ZipFile(tmp_path / "x.pth")
    assert {name: e.size for name, e in directory(data).items()} == {i.filename: i.file_size for i in theirs.infolist()}
    entry = directory(data)["x/data/0"]
    assert data[entry.offset : entry.offset + entry.size] == torch.arange(100).numpy().tobytes()


def central(data: bytes, number: int = 0) -> int:
    """Where an entry of the central directory begins."""
    at = data.index(b"PK\x01\x02")
    for _ in range(number):
        at = data.index(b"PK\x01\x02", at + 4)
    return at


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    packed = struct.pack(form, value)
    return data[:at] + packed + data[at + len(packed) :]


def local(data: bytes, number: int) -> int:
    return int(struct.unpack_from("<L", data, central(data, number) + 42)[0])


def end(data: bytes) -> int:
    return data.rindex(b"PK\x05\x06")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda d: b"",
    "only the end record, cut": lambda d: d[-10:],
    "cut": lambda d: d[:-1],
    "cut in the data": lambda d: d[: len(d) // 2],
    "something after the end": lambda d: d + b"\0",
    "a comment": lambda d: put(d, end(d) + 20, "<H", 4) + b"Hey.",
    "a prefix": lambda d: b"#!/bin/sh\n" + d,
    "another directory offset": lambda d: put(d, end(d) + 16, "<L", 1),
    "directory beyond the file": lambda d: put(d, end(d) + 16, "<L", 2**31),
    "directory larger than the file": lambda d: put(d, end(d) + 12, "<L", 2**31),
    "fewer entries than there are": lambda d: put(put(d, end(d) + 8, "<H", 2), end(d) + 10, "<H", 2),
    "more entries than there are": lambda d: put(put(d, end(d) + 8, "<H", 4), end(d) + 10, "<H", 4),
    "60,000 entries": lambda d: put(put(d, end(d) + 8, "<H", 60000), end(d) + 10, "<H", 60000),
    "several disks": lambda d: put(d, end(d) + 4, "<H", 1),
    "zip64 asked for and absent": lambda d: put(d, end(d) + 16, "<L", 2**32 - 1),
    "an entry twice": lambda d: archive({"a/x": b"1", "a/y": b"2"}).replace(b"a/y", b"a/x"),
    "not ASCII": lambda d: d.replace(b"a/version", b"a/\xffersion"),
    "compressed by the directory": lambda d: put(d, central(d) + 10, "<H", 8),
    "compressed by the header": lambda d: put(d, local(d, 0) + 8, "<H", 8),
    "encrypted": lambda d: put(put(d, central(d) + 8, "<H", 1), local(d, 0) + 6, "<H", 1),
    "a longer name than the directory's": lambda d: put(d, local(d, 1) + 26, "<H", 20),
    "another name before the data": lambda d: d.replace(b"a/data/0", b"a/data/1", 1),
    "another size before the data": lambda d: put(d, local(d, 1) + 22, "<L", 99),
    "another checksum before the data": lambda d: put(d, local(d, 1) + 14, "<L", 1),
    "another checksum in the directory": lambda d: put(d, central(d, 1) + 16, "<L", 1),
    "packed size is not the size": lambda d: put(d, central(d, 1) + 20, "<L", 50),
    "smaller": lambda d: put(put(d, central(d, 1) + 20, "<L", 50), central(d, 1) + 24, "<L", 50),
    "larger": lambda d: put(put(d, central(d, 1) + 20, "<L", 1 << 30), central(d, 1) + 24, "<L", 1 << 30),
    "two entries at one place": lambda d: put(d, central(d, 1) + 42, "<L", 0),
    "overlapping": lambda d: put(d, central(d, 2) + 42, "<L", local(d, 1) + 10),
    "an entry in the directory itself": lambda d: put(d, central(d, 2) + 42, "<L", central(d)),
    "another disk": lambda d: put(d, central(d, 1) + 34, "<H", 1),
    "a comment of an entry": lambda d: put(d, central(d, 0) + 32, "<H", 3),
    "an extra field longer than the directory": lambda d: put(d, central(d, 2) + 30, "<H", 60000),
    "a broken signature": lambda d: d.replace(b"PK\x01\x02", b"PK\x01\x03", 1),
    "no local header": lambda d: d.replace(b"PK\x03\x04", b"PK\x03\x05", 1),
    "a hole": lambda d: move(d, 16),
}


def move(data: bytes, by: int) -> bytes:
    """Leave bytes that belong to no entry before the directory."""
    at = central(data)
    return put(data[:at] + b"\0" * by + data[at:], end(data) + by + 16, "<L", at + by)


@pytest.mark.parametrize("kind", DAMAGE)
def test_whatever_two_readers_could_see_differently_is_refused(kind: str) -> None:
    data = DAMAGE[kind](archive())
    assert_refused(lambda: directory(data), ["file.pth"])


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    bomb = archive({"a/data.pkl": b"\0" * 1_000_000}, zipfile.ZIP_DEFLATED)
    assert_refused(lambda: directory(bomb), ["'a/data.pkl' is compressed"])


def test_more_entries_than_any_checkpoint_has_are_refused() -> None:
    many = archive({f"a/{number}": b"" for number in range(20_001)})
    assert_refused(lambda: directory(many), ["20,001 entries"])


def test_a_data_descriptor_must_say_what_the_directory_says(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    at = data.index(b"PK\x07\x08")
    assert_refused(lambda: directory(put(data, at + 8, "<L", 1)), ["disagree"])
    assert_refused(lambda: directory(data.replace(b"PK\x07\x08", b"PK\x07\x09", 1)), ["disagree"])


@given(st.data())
def test_a_changed_byte_is_refused_or_leaves_every_entry_inside_the_file(data: st.DataObject) -> None:
    whole = archive(zip64=data.draw(st.booleans()))
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = put(whole, at, "<B", data.draw(st.integers(0, 255)))
    try:
        found = directory(changed)
    except InputError:
        return
    spans = sorted((e.offset, e.offset + e.size) for e in found.values())
    assert all(0 <= begin <= stop <= len(changed) for begin, stop in spans)
    assert all(stop <= begin for (_, stop), (begin, _) in pairwise(spans))
