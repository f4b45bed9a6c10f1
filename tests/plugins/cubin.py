"""What a cubin says of its kernels, read from the ELF file: a second source beside the table that the build writes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

EM_CUDA = 190
NOBITS = 8
# Attributes in a section .nv.info.<kernel>: one of a parameter, and the block size that the kernel was compiled for.
PARAMETER = 0x17
REQUIRED_THREADS = 0x10


@dataclass(frozen=True)
class Cubin:
    """One kernel's cubin.

    Args:
        sms: SM numbers that its flags may stand for (the place of the number moved with CUDA 13).
        parameters: Bytes of every parameter, in order.
        threads: Of a block, in x, y and z.
    """

    sms: tuple[int, int]
    parameters: tuple[int, ...]
    threads: tuple[int, int, int]


def read_cubin(image: bytes, symbol: str) -> Cubin:
    """Read it; a KeyError names what is not there."""
    assert image[:4] == b"\x7fELF"
    machine, flags = struct.unpack_from("<H", image, 18)[0], struct.unpack_from("<I", image, 48)[0]
    assert machine == EM_CUDA
    sections = _sections(image)
    assert sections[f".text.{symbol}"]
    attributes = list(_attributes(sections[f".nv.info.{symbol}"]))
    parameters = {}
    for value in (value for attribute, value in attributes if attribute == PARAMETER):
        _, ordinal, _, packed = struct.unpack("<IHHI", value)
        parameters[ordinal] = packed >> 18
    (threads,) = (struct.unpack("<3I", value) for attribute, value in attributes if attribute == REQUIRED_THREADS)
    return Cubin((flags & 0xFF, flags >> 8 & 0xFF), tuple(parameters[i] for i in range(len(parameters))), threads)


def _sections(image: bytes) -> dict[str, bytes]:
    (start,) = struct.unpack_from("<Q", image, 40)
    count, names_index = struct.unpack_from("<HH", image, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, start + 64 * index) for index in range(count)]
    names = headers[names_index][4]
    return {
        image[names + header[0] : image.index(b"\0", names + header[0])].decode(): image[header[4] :][: header[5]]
        for header in headers
        if header[1] != NOBITS
    }


def _attributes(section: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == 4:  # a value of `size` bytes follows; in other forms `size` is the value
            yield attribute, section[at : at + size]
            at += size
