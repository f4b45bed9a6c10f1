"""Headers of safetensors files that lie: about their size, dtypes, shapes, ranges, keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.bases import checkpoint
from tests.hostile.case import Family, cases
from tests.hostile.files import EMBED, NORM, SINGLE, Header, after, edit_header, read_raw, sparse, text, write_raw


def entry(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Another value for a field of a tensor's entry."""
    return edit_header(lambda header: header[name].update({key: value}))


def raw(change: Callable[[bytes], bytes], length: int | None = None) -> Callable[[Path], None]:
    """Change the header's text; ``length`` is what the file says of it."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / SINGLE)
        write_raw(folder / SINGLE, change(json.dumps(header).encode()), data, length)

    return damage


def shift(name: str, begin: int, end: int) -> Callable[[Path], None]:
    """Move the ends of a tensor's range."""

    def change(header: Header) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return edit_header(change)


def same_range(header: Header) -> None:
    """Two tensors of a size over the same bytes."""
    first, second = [entry for name, entry in header.items() if name.endswith("input_layernorm.weight")][:2]
    second["data_offsets"] = first["data_offsets"]


def hole(folder: Path) -> None:
    """Unused bytes between two tensors."""
    header, data = read_raw(folder / SINGLE)
    begin = header[NORM]["data_offsets"][0]
    for fields in header.values():
        if fields["data_offsets"][0] >= begin:
            fields["data_offsets"] = [offset + 64 for offset in fields["data_offsets"]]
    write_raw(folder / SINGLE, json.dumps(header).encode(), data[:begin] + bytes(64) + data[begin:])


def duplicate(key: bytes) -> Callable[[bytes], bytes]:
    """A key of the first tensor's entry, twice."""
    return lambda header: header.replace(key, key + b": 0, " + key, 1)


def many(count: int) -> Callable[[Path], None]:
    """That many tensors of no size."""
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    return edit_header(lambda header: header.update({f"t{i}": empty for i in range(count)}))


def padded(size: int, filler: bytes) -> Callable[[Path], None]:
    """A header that is so long because of one value."""

    def damage(folder: Path) -> None:
        write_raw(folder / SINGLE, b'{"a": ' + filler * (size // len(filler)) + b"}")

    return damage


def poke(length: int) -> Callable[[Path], None]:
    """Say that the header has this length."""

    def damage(folder: Path) -> None:
        with (folder / SINGLE).open("r+b") as stream:
            stream.write(length.to_bytes(8, "little"))

    return damage


FAMILY = Family(
    base=checkpoint,
    cases=cases(
        {
            "shape over the data": (entry(EMBED, "shape", [65, 32]), (SINGLE, EMBED, "data_offsets")),
            "empty file": (text(SINGLE, b""), (SINGLE, "not a safetensors file")),
            "seven bytes": (text(SINGLE, b"\x10" + bytes(6)), (SINGLE, "not a safetensors file")),
            "length above the file": (raw(lambda h: h, 1 << 24), (SINGLE, "truncated inside the header")),
            "length of 2**64 - 1": (raw(lambda h: h, 2**64 - 1), (SINGLE, "not a safetensors file")),
            "length of 2**63": (raw(lambda h: h, 2**63), (SINGLE, "not a safetensors file")),
            "header above 100 MB": (
                after(sparse(SINGLE, 200_000_000), poke(100_000_001)),
                (SINGLE, "100,000,001 bytes"),
            ),
            "header of 100 MB, all zeros": (
                after(sparse(SINGLE, 100_000_008), poke(100_000_000)),
                (SINGLE,),
            ),
            "header of 90 MB, one text": (padded(90_000_000, b'"' + b"x" * 89_999_998 + b'"'), (SINGLE, "'a'")),
            "header of 60 MB, empty lists": (
                lambda p: write_raw(p / SINGLE, b'{"a": [' + b"[]," * 20_000_000 + b"[]]}"),
                (SINGLE,),
            ),
            "header of 60 MB, empty objects": (
                lambda p: write_raw(p / SINGLE, b'{"a": [' + b"{}," * 20_000_000 + b"{}]}"),
                (SINGLE,),
            ),
            "header of 90 MB, numbers": (
                lambda p: write_raw(p / SINGLE, b'{"a": [' + b"0," * 45_000_000 + b"0]}"),
                (SINGLE,),
            ),
            "header of 9 MB, different keys": (
                lambda p: write_raw(p / SINGLE, b"{%s}" % b",".join(b'"%x":0' % i for i in range(800_000))),
                (SINGLE, "800,000 entries"),
            ),
            "header of 90 MB, astral text": (
                lambda p: write_raw(p / SINGLE, b'{"a": "' + "\U0001f600".encode() * 22_000_000 + b'"}'),
                (SINGLE,),
            ),
            "header of 90 MB, one number": (padded(90_000_000, b"9" * 90_000_000), (SINGLE,)),
            "length zero": (raw(lambda h: h, 0), (SINGLE, "not valid JSON")),
            "length cuts the JSON": (raw(lambda h: h, 40), (SINGLE, "not valid JSON")),
            "not UTF-8": (raw(lambda h: h[:-1] + b"\xff}"), (SINGLE, "not UTF-8")),
            "UTF-16": (raw(lambda h: h.decode().encode("utf-16")), (SINGLE, "not UTF-8")),
            "a byte order mark": (raw(lambda h: b"\xef\xbb\xbf" + h), (SINGLE, "not valid JSON")),
            "a list": (raw(lambda h: b"[" + h + b"]"), (SINGLE, "object")),
            "text after the JSON": (raw(lambda h: h + b"x"), (SINGLE, "not valid JSON")),
            "nested 100,000 deep": (raw(lambda h: b'{"a":' * 100_000), (SINGLE, "nested too deeply")),
            "nested lists": (raw(lambda h: b'{"a":' + b"[" * 1_000_000), (SINGLE, "nested too deeply")),
            "a tensor twice": (raw(lambda h: h[:-1] + b"," + h[1:]), (SINGLE, EMBED, "twice")),
            "a field twice": (raw(duplicate(b'"dtype"')), (SINGLE, "dtype", "twice")),
            "an escaped name twice": (
                raw(lambda h: h[:-1] + b', "model.norm\\u002eweight": {}}'),
                (SINGLE, NORM, "twice"),
            ),
            "unknown dtype": (entry(EMBED, "dtype", "F7"), (SINGLE, EMBED, "F7")),
            "dtype of another size": (entry(EMBED, "dtype", "F32"), (SINGLE, EMBED, "data_offsets")),
            "dtype of another kind": (entry(EMBED, "dtype", "I16"), (SINGLE, EMBED, "I16")),
            "dtype is a list": (entry(EMBED, "dtype", ["F16"]), (SINGLE, EMBED, "dtype")),
            "dtype is null": (entry(EMBED, "dtype", None), (SINGLE, EMBED, "dtype")),
            "dtype in lower case": (entry(EMBED, "dtype", "f16"), (SINGLE, EMBED, "f16")),
            "no dtype": (edit_header(lambda h: h[EMBED].pop("dtype")), (SINGLE, EMBED, "lacks")),
            "no shape": (edit_header(lambda h: h[EMBED].pop("shape")), (SINGLE, EMBED, "lacks")),
            "no range": (edit_header(lambda h: h[EMBED].pop("data_offsets")), (SINGLE, EMBED, "lacks")),
            "an entry is a number": (edit_header(lambda h: h.update({EMBED: 1})), (SINGLE, EMBED)),
            "shape is negative": (entry(EMBED, "shape", [-64, -32]), (SINGLE, EMBED, "shape")),
            "shape overflows 64 bits": (entry(EMBED, "shape", [2**33, 2**33]), (SINGLE, EMBED)),
            "shape wraps to the right size": (entry(EMBED, "shape", [2**32 + 64, 2**32, 32]), (SINGLE, EMBED)),
            "a size beyond 64 bits": (entry(EMBED, "shape", [10**30]), (SINGLE, EMBED, "shape")),
            "shape with a zero": (entry(EMBED, "shape", [0, 2048]), (SINGLE, EMBED)),
            "shape of floats": (entry(EMBED, "shape", [64.0, 32.0]), (SINGLE, EMBED, "shape")),
            "shape of booleans": (entry(EMBED, "shape", [True, 2048]), (SINGLE, EMBED, "shape")),
            "shape of text": (entry(EMBED, "shape", ["64", "32"]), (SINGLE, EMBED, "shape")),
            "rank 1000": (entry(EMBED, "shape", [64, 32] + [1] * 998), (SINGLE, EMBED, "shape")),
            "rank one million": (entry(EMBED, "shape", [1] * 10**6), (SINGLE, EMBED, "shape")),
            "other dims of the same size": (entry(EMBED, "shape", [32, 64]), (SINGLE, EMBED, "[64, 32]")),
            "range beyond the file": (shift(EMBED, 1 << 40, 1 << 40), (SINGLE, EMBED, "truncated")),
            "range beyond 64 bits": (shift(EMBED, 1 << 64, 1 << 64), (SINGLE, EMBED, "data_offsets")),
            "range of a negative begin": (shift(EMBED, -(1 << 20), -(1 << 20)), (SINGLE, EMBED, "data_offsets")),
            "range backwards": (entry(EMBED, "data_offsets", [4096, 0]), (SINGLE, EMBED, "data_offsets")),
            "range of one number": (entry(EMBED, "data_offsets", [0]), (SINGLE, EMBED, "data_offsets")),
            "range of three numbers": (entry(EMBED, "data_offsets", [0, 1, 2]), (SINGLE, EMBED, "data_offsets")),
            "range of NaN": (entry(EMBED, "data_offsets", [0, float("nan")]), (SINGLE, EMBED, "data_offsets")),
            "overlap by one byte": (shift(NORM, -1, -1), (SINGLE, "overlaps")),
            "overlap of two whole tensors": (edit_header(same_range), (SINGLE, "layernorm", "overlaps")),
            "a hole": (hole, (SINGLE, NORM, "unused bytes")),
            "bytes after the last tensor": (
                lambda p: (p / SINGLE).write_bytes((p / SINGLE).read_bytes() + bytes(9)),
                (SINGLE, "9 bytes after"),
            ),
            "a name of control characters": (
                edit_header(lambda h: h.update({"\x1b[2J\x07": h.pop(NORM)})),
                (SINGLE, NORM),
            ),
            "a name of two lines": (
                edit_header(lambda h: h.update({"a\nerror: b": {**h[NORM], "dtype": "X"}})),
                (SINGLE, "X"),
            ),
            "a name of a megabyte": (
                edit_header(lambda h: h.update({"x" * 10**6: {**h[NORM], "dtype": "X"}})),
                (SINGLE, "xxx"),
            ),
            "a lone surrogate": (
                edit_header(lambda h: h.update({"\ud800": {**h[NORM], "dtype": "X"}})),
                (SINGLE, "ud800"),
            ),
            **{f"{count:,} empty tensors": (many(count), (SINGLE,)) for count in (40_000, 200_000)},
            "a Git LFS pointer": (text(SINGLE, "version https://git-lfs.github.com/spec/v1\n"), (SINGLE, "Git LFS")),
            "a zip": (text(SINGLE, b"PK\x03\x04" + bytes(200)), (SINGLE,)),
            "a pickle": (text(SINGLE, b"\x80\x02cos\nsystem\n(S'touch canary'\ntR." + bytes(64)), (SINGLE,)),
        }
    ),
)
