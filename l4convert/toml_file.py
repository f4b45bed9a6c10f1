"""Reading TOML files of the user's, which may have been downloaded like anything else."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from l4convert.errors import InputError

MAX_BYTES = 1 << 20
# Of a line: tomllib takes the square of a key's parts in time and memory.
MAX_DOTS = 200


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        InputError: As :func:`toml_bytes` and :func:`parse_toml`.
    """
    return parse_toml(toml_bytes(path), str(path))


def toml_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: It cannot be read, or is larger than ``MAX_BYTES``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: more than the {MAX_BYTES:,} bytes that such a file can sensibly have")
    return data


def parse_toml(data: bytes | str, where: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        data: The text, or its bytes in UTF-8.
        where: What messages call it.

    Raises:
        InputError: It is not TOML, or nested more deeply than anybody writes it.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            raise InputError(f"{where}: not a TOML file: a line with more than {MAX_DOTS} dots")
        return tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"{where}: not a TOML file: nested too deeply") from error
    except ValueError as error:  # besides TOMLDecodeError that of integers with thousands of digits, and of UTF-8
        raise InputError(f"{where}: not a TOML file: {error}") from error
