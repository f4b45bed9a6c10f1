"""Typed reading of keys of a JSON object: every failure is one line that names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from l4convert.checkpoint.text import json_type, quote, show
from l4convert.errors import InputError

MAX_INT = 2**31 - 1
FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, 3.4e38
_REQUIRED: Any = object()


@dataclass(frozen=True)
class Fields:
    """A JSON object of a file.

    Attributes:
        values: The parsed object.
        file: The file, as messages name it.
        prefix: Where in the file the object is, such as ``text_config.``.
    """

    values: Mapping[str, Any]
    file: str
    prefix: str = ""

    def has(self, key: str) -> bool:
        """Whether the key is there with another value than null."""
        return self.values.get(key) is not None

    def fail(self, key: str, problem: str, hint: str | None = None) -> NoReturn:
        """Raise an InputError about a key."""
        raise InputError(f"{self.file}: {show(self.prefix + key)} {problem}", hint)

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; an absent one is its default, or an error where there is none."""
        value = self.values.get(key, default)
        if value is _REQUIRED:
            self.fail(key, "is missing")
        return value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = MAX_INT) -> int:
        """An integer in [low, high]."""
        return self.checked_integer(key, self.get(key, default), low, high)

    def checked_integer(self, key: str, value: Any, low: int, high: int) -> int:
        """``value``, if it is an integer (true and 1.0 are not) in [low, high]."""
        if type(value) is not int:
            self.fail(key, f"must be an integer, not {json_type(value)}")
        if not low <= value <= high:
            self.fail(key, f"is {quote(value)}, must be from {low:,} to {high:,}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, positive: bool = True) -> float:
        """A number that float32 can hold, greater than zero unless ``positive`` says otherwise."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            self.fail(key, f"must be a number, not {json_type(value)}")
        # NaN, infinity and huge integers all fail the comparison.
        fits = FLOAT32_TINY <= value <= FLOAT32_MAX or (not positive and -FLOAT32_MAX <= value <= FLOAT32_TINY)
        if not fits:
            self.fail(key, f"is {quote(value)}, must be a finite number{' above 0' if positive else ''} for float32")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED, or_integer: bool = False) -> bool:
        """True or false; ``or_integer``: a natural number too (0 is false)."""
        value = self.get(key, default)
        if or_integer and type(value) is int and value >= 0:
            return value != 0
        if type(value) is not bool:
            self.fail(key, f"must be true or false, not {json_type(value)}")
        return value

    def array(self, key: str) -> list[Any] | None:
        """A list; None where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            self.fail(key, f"must be an array, not {json_type(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the key is absent or null."""
        found = self.array(key) or []
        for item in found:
            if not isinstance(item, str):
                self.fail(key, f"has {quote(item)}, which is no text")
        return found

    def object(self, key: str) -> Fields | None:
        """A nested object; None where the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, f"must be an object, not {json_type(value)}")
        return Fields(value, self.file, f"{self.prefix}{key}.")
