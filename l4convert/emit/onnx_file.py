"""Parsing an ONNX file that nobody vouches for.

Protobuf for Python gives bytes for a string that is not UTF-8, where every reader expects str: ONNX's schema is
proto2, for which the parser does not check (https://protobuf.dev/programming-guides/proto2/#scalar).
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # publishes no types
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]


def parse_onnx(path: Path) -> onnx.ModelProto | None:
    """A model as its file states it, with all text in it being text; None where the file is none.

    Raises:
        OSError: It cannot be read.
    """
    model = onnx.ModelProto()
    with path.open("rb") as file:
        if file.read(1) == b"\0":  # no message begins so; a file of zeros, however long, is not read
            return None
        file.seek(0)
        try:
            model.ParseFromString(file.read())
        except DecodeError:
            return None
    return None if has_broken_text(model) else model


def has_broken_text(message: Message) -> bool:
    """Whether a string anywhere in a message is not UTF-8."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else (value,)
        if field.type == FieldDescriptor.TYPE_STRING:
            if not all(isinstance(text, str) for text in values):
                return True
        elif field.type == FieldDescriptor.TYPE_MESSAGE and any(has_broken_text(inner) for inner in values):
            return True
    return False
