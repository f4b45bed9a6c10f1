"""The directory of a zip archive of stored (uncompressed) entries, read strictly.

Fields are those of PKWARE's APPNOTE 6.3.10: local headers (4.3.7), data descriptors (4.3.9), central directory
(4.3.12), its end (4.3.14 to 4.3.16), zip64 (4.5.3). Readers of zip files differ in which of two contradicting fields
they believe, so here every field that is written twice must say the same in both places, and every byte before the
directory must belong to exactly one entry. Nothing is ever decompressed.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from l4convert.checkpoint.text import show
from l4convert.errors import InputError

MAX_ENTRIES = 20_000
MAX_NAME = 1024
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_CENTRAL, _LOCAL, _DESCRIPTOR = b"PK\x01\x02", b"PK\x03\x04", b"PK\x07\x08"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _CENTRAL_BYTES, _LOCAL_BYTES = 22, 56, 20, 46, 30
_MOST_CENTRAL = MAX_ENTRIES * (_CENTRAL_BYTES + MAX_NAME)
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_FULL = (_FULL16, _FULL16, _FULL16, _FULL16, _FULL32, _FULL32)  # the end record's fields, where zip64 has them
_FOLLOWS, _UTF8 = 0x0008, 0x0800  # sizes and CRC follow the data; the name is UTF-8
_ZIP64_FIELD = 1
SAVE_HINT = "save it again with torch.save, which stores entries uncompressed, or download it again"


@dataclass(frozen=True)
class ZipEntry:
    """A stored entry.

    Attributes:
        name: As the archive has it.
        offset: Where its bytes begin in the file.
        size: How many there are.
        crc: Their CRC-32, as the directory gives it (torch can be told to write none).
    """

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Header:
    """What the central directory says about an entry."""

    name: bytes
    flags: int
    crc: int
    size: int
    local: int


def read_directory(file: BinaryIO, size: int, where: str) -> dict[str, ZipEntry]:
    """Read the directory of an archive.

    Args:
        file: The archive, seekable.
        size: Of the file in bytes.
        where: What messages call it.

    Returns:
        Its entries by name, in the order of their data.

    Raises:
        InputError: It is not a whole zip archive whose entries are all stored, apart from each other, and described
            alike wherever they are described.
    """
    begin, length, count, end = _find_directory(file, size, where)
    file.seek(begin)
    headers = list(_headers(io.BytesIO(file.read(length)), count, where))
    headers.sort(key=lambda header: header.local)
    entries: dict[str, ZipEntry] = {}
    position = 0
    for header in headers:
        entry, position = _local(file, header, position, begin, where)
        if entry.name in entries:
            raise InputError(f"{where}: entry '{show(entry.name)}' occurs twice in the archive", SAVE_HINT)
        entries[entry.name] = entry
    if position != begin or begin + length != end:
        raise InputError(f"{where}: bytes of the archive belong to no entry (at {position:,})", SAVE_HINT)
    return entries


def _find_directory(file: BinaryIO, size: int, where: str) -> tuple[int, int, int, int]:
    """Begin, length and number of entries of the central directory, and where what ends it begins."""
    end = size - _END_BYTES
    file.seek(max(0, end))
    record = file.read(_END_BYTES)
    if len(record) < _END_BYTES or record[:4] != _END:
        what = "a zip archive that ends too early, or has something after its end"
        raise InputError(f"{where}: {what}", "download it again, or finish the download")
    *fields, comment = struct.unpack("<4H2LH", record[4:])
    if (wide := _find_directory64(file, end, where)) is not None:  # torch.save always writes one
        end, *values = wide
        if any(value not in {field, full} for field, value, full in zip(values, fields, _FULL, strict=True)):
            raise InputError(f"{where}: its zip and zip64 directories disagree", SAVE_HINT)
        fields = values
    disk, first, here, count, length, begin = fields
    if disk or first or here != count or comment:
        raise InputError(f"{where}: a zip archive of several parts, or with a comment", SAVE_HINT)
    if count > MAX_ENTRIES or length > _MOST_CENTRAL or not 0 <= begin <= end - length:
        raise InputError(f"{where}: its zip directory cannot be right: {count:,} entries in {length:,} bytes")
    return begin, length, count, end


def _find_directory64(file: BinaryIO, end: int, where: str) -> list[int] | None:
    """Where the zip64 records before ``end`` begin, and the fields of the end record; None where there are none."""
    start = end - _LOCATOR_BYTES - _END64_BYTES
    if start < 0:
        return None
    file.seek(start)
    record, locator = file.read(_END64_BYTES), file.read(_LOCATOR_BYTES)
    if locator[:4] != _LOCATOR64:
        return None
    (own,) = struct.unpack("<Q", record[4:12])
    here = (0, start, 1) == struct.unpack("<LQL", locator[4:])
    if record[:4] != _END64 or own != _END64_BYTES - 12 or not here:
        raise InputError(f"{where}: its zip64 directory cannot be right", SAVE_HINT)
    return [start, *struct.unpack("<2L4Q", record[16:])]


def _headers(central: io.BytesIO, count: int, where: str) -> Iterator[_Header]:
    for number in range(count):
        fixed = central.read(_CENTRAL_BYTES)
        if len(fixed) < _CENTRAL_BYTES or fixed[:4] != _CENTRAL:
            raise InputError(f"{where}: entry {number} of its zip directory is broken", SAVE_HINT)
        (_, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, local) = (
            struct.unpack("<6H3L5H2L", fixed[4:])
        )
        name, extra = central.read(name_length), central.read(extra_length)
        entry = f"{where}: entry '{show(name.decode('utf-8', 'replace'))}'"
        if len(name) > MAX_NAME or len(name) < name_length or len(extra) < extra_length:
            raise InputError(f"{entry}: its name or fields do not fit", SAVE_HINT)
        if method or flags & ~(_FOLLOWS | _UTF8) or comment:
            raise InputError(f"{entry} is compressed, encrypted, or has a comment", SAVE_HINT)
        fields = [(size, _FULL32), (packed, _FULL32), (local, _FULL32), (disk, _FULL16)]
        size, packed, local, disk = _widened(extra, fields, entry)
        if size != packed or disk:
            raise InputError(f"{entry}: stored, yet {packed:,} bytes for {size:,}", SAVE_HINT)
        yield _Header(name, flags, crc, size, local)
    if central.read(1):
        raise InputError(f"{where}: its zip directory is longer than its {count:,} entries", SAVE_HINT)


def _widened(extra: bytes, fields: list[tuple[int, int]], entry: str) -> list[int]:
    """Values of a header; those that are all ones stand, in this order, in the zip64 extra field.

    Args:
        extra: The extra fields.
        fields: Each value, and what it is when all its bits are one.
        entry: What messages call the entry.
    """
    wide = _zip64_field(extra, entry)
    values = []
    for value, full in fields:
        if value != full:
            values.append(value)
            continue
        width = 8 if full == _FULL32 else 4
        if len(wide) < width:
            raise InputError(f"{entry}: a zip64 size or place is missing", SAVE_HINT)
        values.append(int.from_bytes(wide[:width], "little"))
        wide = wide[width:]
    return values


def _zip64_field(extra: bytes, entry: str) -> bytes:
    found = None
    while extra:
        kind, length = struct.unpack("<2H", extra[:4]) if len(extra) >= 4 else (0, _FULL16)
        if length > len(extra) - 4 or (kind == _ZIP64_FIELD and found is not None):
            raise InputError(f"{entry}: its extra fields are broken", SAVE_HINT)
        if kind == _ZIP64_FIELD:
            found = extra[4 : 4 + length]
        extra = extra[4 + length :]
    return found or b""


def _local(file: BinaryIO, header: _Header, position: int, limit: int, where: str) -> tuple[ZipEntry, int]:
    """Check the local header, which must be at ``position``; the entry, and where the next one must be."""
    try:
        name = header.name.decode("ascii")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: an entry's name is not ASCII: {show(ascii(header.name))}", SAVE_HINT) from error
    entry = f"{where}: entry '{show(name)}'"
    if header.local != position:
        fault = "overlaps another one" if header.local < position else "does not follow the one before it"
        raise InputError(f"{entry} {fault} (at byte {header.local:,} of the file)", SAVE_HINT)
    file.seek(position)
    fixed = file.read(_LOCAL_BYTES)
    if len(fixed) < _LOCAL_BYTES or fixed[:4] != _LOCAL:
        _disagree(entry)
    _, flags, method, _, _, crc, packed, size, name_length, extra_length = struct.unpack("<5H3L2H", fixed[4:])
    if (flags, method, file.read(min(name_length, MAX_NAME))) != (header.flags, 0, header.name):
        _disagree(entry)
    extra = file.read(extra_length)
    offset = position + _LOCAL_BYTES + name_length + extra_length
    end = offset + header.size
    if end > limit or len(extra) < extra_length:
        raise InputError(f"{entry}: its {header.size:,} bytes reach beyond the archive's entries", SAVE_HINT)
    size, packed = _widened(extra, [(size, _FULL32), (packed, _FULL32)], entry)
    known = (header.crc, header.size, header.size)
    if flags & _FOLLOWS:
        if (crc, packed, size) not in {(0, 0, 0), known}:
            _disagree(entry)
        end = _after_descriptor(file, header, end, entry)
    elif (crc, packed, size) != known:
        _disagree(entry)
    return ZipEntry(name, offset, header.size, header.crc), end


def _after_descriptor(file: BinaryIO, header: _Header, end: int, entry: str) -> int:
    """Where the data descriptor at ``end`` ends; its sizes have 8 bytes where 4 do not hold them."""
    file.seek(end)
    found = file.read(24)
    forms = ["<4sLQQ", *(["<4sLLL"] if header.size < _FULL32 else [])]
    known = (struct.pack(form, _DESCRIPTOR, header.crc, header.size, header.size) for form in forms)
    length = next((len(descriptor) for descriptor in known if found.startswith(descriptor)), None)
    if length is None:
        _disagree(entry)
    return end + length


def _disagree(entry: str) -> NoReturn:
    raise InputError(f"{entry}: what stands before or after its bytes and the zip directory disagree", SAVE_HINT)
