"""The header of the safetensors file that is written: a length and JSON, padded so that the data starts on a page.

Format: https://huggingface.co/docs/safetensors ("Format"). Reading is :mod:`l4convert.checkpoint.safetensors_file`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from l4convert.checkpoint.safetensors_file import MAX_HEADER_BYTES, SAFETENSORS_NAMES
from l4convert.errors import InputError

PAGE = 4096


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; ``begin`` and ``end`` count bytes from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_as(dtype: ir.DataType, shape: tuple[int, ...], nbytes: int) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and shape of an ONNX tensor of ``nbytes`` bytes.

    What safetensors has no type for, 4-bit types among it, is stored as its packed bytes: U8, shape [nbytes].
    """
    name = SAFETENSORS_NAMES.get(dtype)
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
