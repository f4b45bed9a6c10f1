"""Loading a shared library that may be no library, or half of one."""

from __future__ import annotations

import ctypes
from pathlib import Path
from struct import unpack_from

from l4convert.errors import InputError


def open_library(path: Path) -> ctypes.CDLL:
    """Load a plugin library into this process.

    Raises:
        InputError: There is no such file, or it is no library, or not a whole one.
    """
    require_whole(path)
    try:
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise not_a_library(path, str(error)) from None


def require_whole(path: Path) -> None:
    """See that there is a library, and that no part of it is missing.

    Raises:
        InputError: There is no such file, or it is cut off.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file", hint="l4convert plugins build makes it")
    if _cut_off(path):
        raise not_a_library(path, "it is cut off")


def not_a_library(path: Path, reason: str) -> InputError:
    """The error for a file that cannot be used; of a loader's reason the last part, which does not repeat the file."""
    return InputError(f"{path}: not a plugin library of l4convert ({reason.rsplit(': ', 1)[-1]})")


def _cut_off(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its table of sections does, which linkers put last.

    The loader maps such a file without looking, and the process dies of SIGBUS.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False  # the loader refuses it
    (table,) = unpack_from("<Q", header, 40)  # e_shoff
    size, count = unpack_from("<2H", header, 58)  # e_shentsize, e_shnum
    return path.stat().st_size < int(table) + int(size) * int(count)
