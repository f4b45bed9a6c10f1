"""Small readers for files that nobody vouches for: JSON with limits, and names made safe for a one-line message."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from l4convert.errors import InputError

SHOWN_CHARACTERS = 160
# A parsed value takes up to thirty times the memory of its text, so the text's size alone does not limit it. Both are
# far above what the index or header of a model with a million tensors has.
MAX_JSON_CONTAINERS = 1_500_000
MAX_JSON_ITEMS = 6_000_000
# An entry of an object takes up to 300 bytes. A manifest has at most seven a tensor, MAX_TENSORS times.
MAX_JSON_ENTRIES = 600_000
# Python stores text with any character above U+FFFF in four bytes a character.
MAX_JSON_WIDE_BYTES = 40_000_000

_QUOTER = reprlib.Repr()
_QUOTER.maxstring = _QUOTER.maxother = SHOWN_CHARACTERS
_QUOTER.maxlist, _QUOTER.maxdict, _QUOTER.maxlevel = 8, 2, 2


# Folder -> a name that says more than its path: where the files of a cache came from.
_FOLDER_NAMES: dict[str, str] = {}


def name_folder(folder: Path, name: str) -> None:
    """Let :func:`show` call a folder, and what lies in it, by another name."""
    _FOLDER_NAMES[str(folder)] = name


def known_name(folder: Path) -> str | None:
    """What :func:`name_folder` called it."""
    return _FOLDER_NAMES.get(str(folder))


def show(text: object) -> str:
    """A name from a file as it may appear in a message: on one line, printable, not too long."""
    shown = str(text)
    for folder, name in _FOLDER_NAMES.items():
        if shown == folder or shown.startswith(f"{folder}/"):
            shown = name + shown[len(folder) :]
    shown = address_text(shown)
    if not shown.isprintable():
        shown = ascii(shown)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[: SHOWN_CHARACTERS - 3]}..."


def is_address(path: object) -> bool:
    """Whether it is meant as an address on the Hugging Face Hub, not as a folder."""
    return str(path) == "hf:" or str(path).startswith("hf:/")


def address_text(path: object) -> str:
    """A path as it was typed: pathlib makes one slash of the two in ``hf://``."""
    text = str(path)
    return f"hf://{text[4:]}" if is_address(text) and not text.startswith("hf://") else text


def quote(value: object) -> str:
    """A JSON value as it may appear in a message: like ``repr``, but short however long or deep the value is."""
    return _QUOTER.repr(value)


def and_more(count: int) -> str:
    """`` (and 3 more)`` for the findings that a one-line message leaves out."""
    return f" (and {count} more)" if count > 0 else ""


def require_file(path: Path, hint: str | None = None) -> int:
    """The size in bytes of a regular file (a link to one will do).

    Raises:
        InputError: It is absent, a dangling link, or something that cannot be read as a file.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        dangling, present = path.is_symlink() and not path.exists(), path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error)}") from error
    reason = "is a link to a file that does not exist" if dangling else "is not a file" if present else "no such file"
    raise InputError(f"{show(path)}: {reason}", hint)


def require_inside(path: Path) -> None:
    """Refuse a link to a file that does not belong to the folder in which the link lies.

    Raises:
        InputError: It leads elsewhere.
    """
    folder, file = (Path(os.path.realpath(place)) for place in (path.parent, path))
    # A Hugging Face cache keeps snapshots/<revision>/<name> as links into blobs/.
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if not any(file.is_relative_to(place) for place in (folder, blobs)):
        raise InputError(f"{show(path)}: a link to a file outside of its folder", "put a copy of the file there")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a small file of a folder that nobody vouches for.

    Raises:
        InputError: It cannot be read, is larger than ``limit`` bytes, or a link that leads out of the folder.
    """
    size = require_file(path)
    require_inside(path)
    if size > limit:
        raise InputError(f"{show(path)}: {size:,} bytes, more than the {limit:,} that such a file can sensibly have")
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error.strerror)}") from error


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8 text.
        what: How a message names it, such as the file's path.

    Raises:
        InputError: Not UTF-8, not JSON, not an object, nested too deeply, with more in it than memory should be spent
            on, or with a key that occurs twice in an object (readers differ in which one they take).
    """
    _check_amount(data, what)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise InputError(f"{what}: key '{show(error)}' occurs twice in one object") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{what}: not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise InputError(f"{what}: not usable JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{what}: not valid JSON: {show(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: a JSON object was expected, not {json_type(value)}")
    return value


def _check_amount(data: bytes, what: str) -> None:
    """Refuse JSON that would take far more memory or time than it has bytes; counted without parsing it.

    Raises:
        InputError: It has too many objects, arrays or items, or is long and not ASCII.
    """
    containers = data.count(b"{") + data.count(b"[")
    if containers > MAX_JSON_CONTAINERS:
        raise InputError(f"{what}: {containers:,} objects and arrays, more than such a file can sensibly have")
    items = data.count(b",") + containers
    if items > MAX_JSON_ITEMS:
        raise InputError(f"{what}: {items:,} items, more than such a file can sensibly have")
    entries = data.count(b":")
    if entries > MAX_JSON_ENTRIES:
        raise InputError(f"{what}: {entries:,} entries of objects, more than such a file can sensibly have")
    if len(data) > MAX_JSON_WIDE_BYTES and not data.isascii():
        raise InputError(f"{what}: {len(data):,} bytes that are not all ASCII, more than such a file can sensibly have")


def json_type(value: object) -> str:
    """JSON's word for the type of a parsed value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names = {int: "an integer", float: "a number", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class _DuplicateKeyError(ValueError):
    """A key that occurs twice in one JSON object; the argument is the key."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result
