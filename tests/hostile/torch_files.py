"""Writing files of ``torch.save``, well-formed or not: an assembler for pickles, and a zip writer that can lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MARK, STOP, TUPLE, DICT, NONE, REDUCE, BUILD, POP = b"(", b".", b"t", b"}", b"N", b"R", b"b", b"0"
EMPTY_TUPLE, SETITEM, SETITEMS, TRUE, FALSE, PERSID, NEWOBJ = b")", b"s", b"u", b"\x88", b"\x89", b"Q", b"\x81"
PROTOCOL = b"\x80\x02"


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    """BININT1, BININT or LONG1."""
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def tuple_of(*parts: bytes) -> bytes:
    """MARK, the parts, TUPLE."""
    return MARK + b"".join(parts) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    """REDUCE."""
    return function + tuple_of(*arguments) + REDUCE


@dataclass(frozen=True)
class Tensor:
    """How a tensor is pickled; every part may be made wrong."""

    key: bytes = field(default_factory=lambda: text("0"))
    shape: Sequence[int] = (2, 2)
    strides: Sequence[int] | None = None
    offset: int = 0
    size: int | None = None
    kind: str = "HalfStorage"
    word: str = "storage"
    tail: bytes = FALSE + call(name("collections", "OrderedDict"))

    def pickled(self) -> bytes:
        """The call of ``_rebuild_tensor_v2``."""
        strides = row_major(self.shape) if self.strides is None else self.strides
        count = 1
        for extent in self.shape:
            count *= extent
        size = count if self.size is None else self.size
        storage = tuple_of(text(self.word), name("torch", self.kind), self.key, text("cpu"), integer(size)) + PERSID
        shape, steps = (tuple_of(*map(integer, values)) for values in (self.shape, strides))
        return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(
            storage, integer(self.offset), shape, steps, self.tail
        ) + REDUCE  # fmt: skip


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def state(entries: Mapping[str, bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    """The pickle of a dictionary, with ``before`` and ``after`` around it on the stack machine's tape."""
    items = b"".join(text(key) + value for key, value in entries.items())
    return PROTOCOL + before + DICT + MARK + items + SETITEMS + after + STOP


@dataclass(frozen=True)
class Entry:
    """An entry of an archive; what is None is what the data says."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    offset: int | None = None
    extra: bytes = b""
    local_name: str | None = None
    local_size: int | None = None
    comment: bytes = b""
    listed: int = 1
    gap: bytes = b""


def archive(
    entries: Sequence[Entry], before: bytes = b"", after: bytes = b"", comment: bytes = b"", count: int | None = None
) -> bytes:
    """A zip archive of these entries, in the order in which they are given."""
    content, central = bytearray(before), bytearray()
    number = 0
    for entry in entries:
        content += entry.gap
        offset = len(content) if entry.offset is None else entry.offset
        size = len(entry.data) if entry.size is None else entry.size
        packed = len(entry.data) if entry.packed is None else entry.packed
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        local_size = size if entry.local_size is None else entry.local_size
        local = (entry.name if entry.local_name is None else entry.local_name).encode()
        if entry.offset is None:
            content += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, entry.flags, entry.method, 0, 0, crc,
                                   packed & 0xFFFFFFFF, local_size & 0xFFFFFFFF, len(local),
                                   len(entry.extra))  # fmt: skip
            content += local + entry.extra + entry.data
        row = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, entry.flags, entry.method, 0, 0, crc,
                          packed & 0xFFFFFFFF, size & 0xFFFFFFFF, len(entry.name.encode()), len(entry.extra),
                          len(entry.comment), 0, 0, 0, offset & 0xFFFFFFFF)  # fmt: skip
        central += (row + entry.name.encode() + entry.extra + entry.comment) * entry.listed
        number += entry.listed
    begin = len(content)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *((number if count is None else count) & 0xFFFF,) * 2,
                      len(central), begin, len(comment))  # fmt: skip
    return bytes(content + central + end + comment + after)


def torch_entries(pickle: bytes, storages: Mapping[str, bytes], folder: str = "archive") -> list[Entry]:
    """The entries that ``torch.save`` writes."""
    return [
        Entry(f"{folder}/data.pkl", pickle),
        Entry(f"{folder}/byteorder", b"little"),
        *(Entry(f"{folder}/data/{key}", data) for key, data in storages.items()),
        Entry(f"{folder}/version", b"3\n"),
    ]


def changed(entries: Sequence[Entry], suffix: str, **values: object) -> list[Entry]:
    """The entries, of which those whose names end so have other fields."""
    return [replace(e, **values) if e.name.endswith(suffix) else e for e in entries]  # type: ignore[arg-type]
