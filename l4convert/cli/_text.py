"""Texts that options name."""

from __future__ import annotations

from pathlib import Path

from l4convert.errors import InputError


def read_text(path: Path, option: str) -> str:
    """A text file, decoded; a byte order mark in front is left out.

    Raises:
        InputError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", f"Give {option} a text file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start}: {error.reason}", _HINT) from error


_HINT = "Convert the file to UTF-8, for example with iconv."
