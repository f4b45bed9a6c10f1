"""The safetensors container: an 8-byte length, a JSON header, then every tensor's bytes without gaps.

Format: https://huggingface.co/docs/safetensors ("Format"); the limits are those of the reference implementation
(safetensors/src/tensor.rs). Here headers are padded with spaces so that the data starts on a page.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from l4convert.errors import InputError

PAGE = 4096
MAX_HEADER_BYTES = 100_000_000

# Everything else, 4-bit types among it, is stored as its packed bytes: dtype U8, shape [nbytes].
STORED_DTYPES: dict[ir.DataType, str] = {
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT16: "U16",
    ir.DataType.INT16: "I16",
    ir.DataType.UINT32: "U32",
    ir.DataType.INT32: "I32",
    ir.DataType.UINT64: "U64",
    ir.DataType.INT64: "I64",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT8E5M2: "F8_E5M2",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT: "F32",
    ir.DataType.DOUBLE: "F64",
}
ITEM_BYTES = {name: int(dtype.itemsize) for dtype, name in STORED_DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``begin`` and ``end`` count bytes from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header: where the data starts in the file, and the entries in file order."""

    data_start: int
    entries: tuple[Entry, ...]


def stored_as(dtype: ir.DataType, shape: tuple[int, ...], nbytes: int) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and shape under which an ONNX tensor of ``nbytes`` bytes is stored."""
    name = STORED_DTYPES.get(dtype)
    return ("U8", (nbytes,)) if name is None else (name, shape)


def encode_header(entries: Iterable[Entry]) -> bytes:
    """Length and JSON header, padded with spaces to whole pages.

    Raises:
        InputError: There are so many tensors that readers would refuse the header.
    """
    fields = {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.begin, e.end)} for e in entries}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    length = align(8 + len(text)) - 8
    if length > MAX_HEADER_BYTES:
        raise InputError(f"model.safetensors: a header of {length} bytes is over the format's {MAX_HEADER_BYTES}")
    return length.to_bytes(8, "little") + text.ljust(length)


def align(position: int) -> int:
    """The first page boundary at or after ``position``."""
    return -(-position // PAGE) * PAGE


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file; nothing in the file is trusted.

    Raises:
        InputError: The file is not a well-formed safetensors file: what is wrong, and with which tensor.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise InputError(f"{path.name}: the header is cut short, or this is not a safetensors file")
        text = file.read(length)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path.name}: the header is not JSON") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path.name}: the header is not a JSON object")
    entries = [_entry(path.name, name, field) for name, field in fields.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_contiguous(path.name, entries, size - 8 - length)
    return Header(8 + length, tuple(entries))


def _entry(file: str, name: str, field: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        integers = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        if integers and isinstance(dtype, str) and dtype in ITEM_BYTES:
            if end - begin == math.prod(shape) * ITEM_BYTES[dtype]:
                return Entry(name, dtype, shape, begin, end)
            raise InputError(f"{file}: tensor {name!r}: dtype, shape and offsets do not agree")
    except (KeyError, TypeError, ValueError, IndexError):
        pass
    raise InputError(f"{file}: tensor {name!r}: malformed header entry")


def _check_contiguous(file: str, entries: list[Entry], data_bytes: int) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise InputError(f"{file}: tensor {entry.name!r} leaves a gap or overlaps its neighbour")
        position = entry.end
    if position != data_bytes:
        raise InputError(f"{file}: the tensors take {position} bytes, the file has {data_bytes}")
