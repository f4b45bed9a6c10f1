"""The patterns of adapter_config.json that give some modules a rank or alpha of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Generic, TypeVar

from l4convert.checkpoint.quantized import patterns
from l4convert.errors import InputError

T = TypeVar("T", int, float)

# Names and dots; there may be one for each of thousands of modules, so they are matched in the cheapest way.
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.){1,1000}")
_MOST_SECONDS = 1.0


class Patterns(Generic[T]):
    """Values for modules whose names end in a match of a regular expression; the first that fits counts.

    As peft's ``get_pattern_key``: ``(.*\\.)?(PATTERN)$`` must match the whole name.

    Args:
        values: By pattern.
        where: How a message names them.

    Raises:
        InputError: A pattern is no regular expression, or not one that can be used.
    """

    def __init__(self, values: Mapping[str, T], where: str) -> None:
        self._where = where
        self._values: dict[str, T] = dict(values)
        self._plain = {key: re.compile(_whole(key)) for key in values if _PLAIN.fullmatch(key)}
        others = [key for key in values if key not in self._plain]
        if len(others) > patterns.MAX_EXPRESSIONS:
            raise InputError(f"{where}: {len(others):,} regular expressions, more than {patterns.MAX_EXPRESSIONS}")
        try:
            self._others = {key: patterns.Patterns([f"re:{_whole(key)}"]) for key in others}
        except patterns.UnusablePatternError as error:
            raise InputError(f"{where}: {error}") from error
        self._seconds = 0.0

    def find(self, name: str, default: T) -> T:
        """The value for a module.

        Raises:
            InputError: The patterns take too long to match.
        """
        return next((value for key, value in self._values.items() if self._fits(key, name)), default)

    def _fits(self, key: str, name: str) -> bool:
        if key in self._plain:
            return self._plain[key].match(name) is not None
        begin = time.process_time()
        try:
            found = self._others[key].match(name, ())
        except patterns.UnusablePatternError as error:
            raise InputError(f"{self._where}: {error}") from error
        self._seconds += time.process_time() - begin
        if self._seconds > _MOST_SECONDS:
            raise InputError(f"{self._where}: the patterns take too long to match", "name the modules in plain words")
        return found


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"
