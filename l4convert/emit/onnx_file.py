"""Parsing an ONNX file that nobody vouches for.

Protobuf for Python gives bytes for a string that is not UTF-8, where every reader expects str: ONNX's schema is
proto2, for which the parser does not check (https://protobuf.dev/programming-guides/proto2/#scalar). And two bytes
make a node, which takes 300 bytes once it is parsed, so the size of a file does not limit what it takes. The file is
therefore walked through as it lies (https://protobuf.dev/programming-guides/encoding/) before it is parsed.
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # publishes no types
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from l4convert.errors import InputError

# Nodes, attributes, values, dimensions, notes of exporters. A Scout that torch exported has about 250,000.
MAX_MESSAGES = 600_000
# Numbers, texts and messages; an array of numbers is one where it is packed, as those of tensors are.
MAX_FIELDS = 3_000_000
# Bytes of packed arrays of integers, each of which becomes one of up to eight bytes.
MAX_PACKED_BYTES = 40_000_000
# Branches of If, bodies of Loop and Scan.
MAX_GRAPHS = 2_000
_BROKEN = "not an ONNX model"
_INTEGERS = {
    getattr(FieldDescriptor, f"TYPE_{name}") for name in ("INT32", "INT64", "UINT32", "UINT64", "ENUM", "BOOL")
}
_WIRES = (0, 1, 2, 5)  # a varint; 8 bytes; a length, and so many bytes; 4 bytes
_FIXED = {1: 8, 5: 4}
_TOO_MUCH = (
    f"more than {MAX_MESSAGES:,} nodes, values and notes, {MAX_GRAPHS:,} graphs, {MAX_FIELDS:,} fields,"
    f" or {MAX_PACKED_BYTES:,} bytes of packed integers"
)


def parse_onnx(path: Path, where: str) -> onnx.ModelProto:
    """A model as its file states it, of a usual size, with all text in it being text.

    Args:
        path: The file.
        where: What messages call it.

    Raises:
        InputError: It is no such file.
        OSError: It cannot be read.
    """
    model = onnx.ModelProto()
    if not path.stat().st_size:
        raise InputError(f"{where}: is {_BROKEN}")
    # Mapped, so that of a file of zeros, however long, next to nothing is read.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if fault := _fault(data):
            raise InputError(f"{where}: is {fault}")
        with memoryview(data) as view:
            try:
                model.ParseFromString(view)
            except DecodeError:
                raise InputError(f"{where}: is {_BROKEN}") from None
    return model


class _Kind(NamedTuple):
    """A type of messages: the numbers of its fields of text, of integers, and of messages with their types."""

    name: str
    texts: frozenset[int]
    integers: frozenset[int]
    messages: dict[int, Any]  # field number to descriptor


@cache
def _kind(descriptor: Any) -> _Kind:
    texts = frozenset(field.number for field in descriptor.fields if field.type == field.TYPE_STRING)
    integers = frozenset(field.number for field in descriptor.fields if field.type in _INTEGERS)
    messages = {field.number: field.message_type for field in descriptor.fields if field.type == field.TYPE_MESSAGE}
    return _Kind(descriptor.name, texts, integers, messages)


def _fault(data: mmap.mmap) -> str | None:
    """What is wrong with the form, the amount or the text of a model's messages."""
    try:
        return _walk(data)
    except IndexError:
        return _BROKEN
    except UnicodeDecodeError:
        return "not a usable ONNX model: a text in it is not UTF-8"


def _walk(data: mmap.mmap) -> str | None:
    """All messages of a model, in the order of the file.

    Raises:
        IndexError: It is cut off.
        UnicodeDecodeError: A text is not UTF-8.
    """
    inside = [(len(data), _kind(onnx.ModelProto.DESCRIPTOR))]
    at = fields = messages = graphs = packed = 0
    while inside:
        end, kind = inside[-1]
        if at >= end:
            inside.pop()
            continue
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        length, at = (_FIXED[wire], at) if wire in _FIXED else _varint(data, at)
        behind = at + (0 if wire == 0 else length)
        if not field or wire not in _WIRES or behind > end:
            return _BROKEN
        fields += 1
        if wire == 2 and field in kind.messages:
            inside.append((behind, _kind(kind.messages[field])))
            messages += 1
            graphs += inside[-1][1].name == "GraphProto"
            behind = at
        elif wire == 2 and field in kind.texts:
            data[at:behind].decode()
        elif wire == 2 and field in kind.integers:
            packed += length
        if fields > MAX_FIELDS or messages > MAX_MESSAGES or graphs > MAX_GRAPHS or packed > MAX_PACKED_BYTES:
            return f"not a usable ONNX model: {_TOO_MUCH}"
        at = behind
    return None


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where the next field begins."""
    if (value := data[at]) < 0x80:
        return value, at + 1
    value &= 0x7F
    for shift in range(7, 70, 7):
        at += 1
        value |= (data[at] & 0x7F) << shift
        if data[at] < 0x80:
            break
    return value, at + 1
