"""Lengths of contexts as people write them."""

from __future__ import annotations

import pytest

from l4convert.errors import UsageError
from l4convert.planning.tokens import parse_context, short_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1M", 1 << 20),
        ("10M", 10_485_760),
        ("128k", 131072),
        (" 1.5 m ", 1572864),
        ("0.5k", 512),
        ("10485760", 10485760),
    ],
)
def test_contexts(text: str, tokens: int):
    assert parse_context(text, 10_485_760) == tokens
    assert parse_context(short_tokens(tokens).replace(",", ""), 10_485_760) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "not a number") for text in ("0", "0.3", "1G", "-1", "", "1e6", "1.0000001k")),
        ("11M", "more than the model's 10,485,760 positions"),
    ],
)
def test_contexts_that_are_refused(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_context(text, 10_485_760)
