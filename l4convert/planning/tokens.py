"""Lengths of contexts as people write them."""

from __future__ import annotations

import re

from l4convert.errors import UsageError

# Powers of 1024, as context lengths are named: Llama 4's "10M" are 10,485,760 positions, "128k" are 131,072.
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


def parse_context(text: str, most: int) -> int:
    """``"128k"``, ``"1M"``, ``"1.5M"`` or a plain number of tokens; k is 1024 and M is 1024 * 1024.

    Args:
        text: As given.
        most: The model's positions.

    Raises:
        UsageError: It is no such number, zero, no whole number of tokens, or more than ``most``.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KM]?)\s*", text, re.IGNORECASE)
    tokens = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if tokens < 1 or tokens != int(tokens):
        raise UsageError(
            f"{text!r} is not a number of tokens", "write it as 128k, 1M or 131072; k is 1024, M is 1048576"
        )
    if tokens > most:
        raise UsageError(
            f"a context of {int(tokens):,} tokens is more than the model's {most:,} positions",
            "in a checkpoint's config.json they are max_position_embeddings",
        )
    return int(tokens)


def short_tokens(tokens: int) -> str:
    """``1M``, ``128k``, ``1.5M`` where that is exact, else the number."""
    for letter in ("M", "K"):
        if tokens >= _UNITS[letter] and tokens * 4 % _UNITS[letter] == 0:
            return f"{tokens / _UNITS[letter]:g}{'M' if letter == 'M' else 'k'}"
    return f"{tokens:,}"
