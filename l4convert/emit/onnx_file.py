"""Parsing an ONNX file that nobody vouches for.

Protobuf for Python gives bytes for a string that is not UTF-8, where every reader expects str: ONNX's schema is
proto2, for which the parser does not check (https://protobuf.dev/programming-guides/proto2/#scalar). And a few bytes
make a node or a graph, so the size of a file does not limit what has to be looked at.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]  # publishes no types
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from l4convert.errors import InputError

# Nodes, attributes, values, dimensions, notes of exporters. A Scout that torch exported has about 250,000.
MAX_MESSAGES = 600_000
# Branches of If, bodies of Loop and Scan.
MAX_GRAPHS = 2_000


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
    with path.open("rb") as file:
        if file.read(1) == b"\0":  # no message begins so; a file of zeros, however long, is not read
            raise InputError(f"{where}: is not an ONNX model")
        file.seek(0)
        try:
            model.ParseFromString(file.read())
        except DecodeError:
            raise InputError(f"{where}: is not an ONNX model") from None
    if fault := _fault(model):
        raise InputError(f"{where}: is not a usable ONNX model: {fault}")
    return model


def _fault(model: onnx.ModelProto) -> str | None:
    """What is wrong with the amount or the text of a model's messages."""
    left: list[Message] = [model]
    seen = graphs = 0
    while left:
        message = left.pop()
        seen += 1
        graphs += isinstance(message, onnx.GraphProto)
        if seen + len(left) > MAX_MESSAGES or graphs > MAX_GRAPHS:
            return f"more than {MAX_MESSAGES:,} nodes, values and notes, or more than {MAX_GRAPHS:,} graphs"
        for field, value in message.ListFields():
            if field.type == FieldDescriptor.TYPE_STRING:
                if not all(isinstance(text, str) for text in (value if field.is_repeated else (value,))):
                    return "a text in it is not UTF-8"
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                left.extend(value if field.is_repeated else (value,))
    return None
