from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.quantized import patterns as module
from l4convert.checkpoint.quantized.patterns import MAX_EXPRESSIONS, Patterns, UnusablePatternError

NAME = "language_model.model.layers.12.feed_forward.experts.3.down_proj"

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\.", "^", "$", r"\b", "(?=a)", "(?!b)"])
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"({'|'.join(options)})"),
    ),
    max_leaves=8,
)


@settings(max_examples=150)
@given(EXPRESSIONS, st.text("ab.1", max_size=8))
def test_expressions_match_as_pythons_do(expression: str, name: str) -> None:
    assert Patterns([f"re:{expression}"]).match(name) == (re.match(expression, name) is not None)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("re:.*down_proj", True),
        (r"re:.*experts\.[0-9]+\.(gate|up|down)_proj$", True),
        ("re:down_proj", False),  # an expression begins where the name does
        ("re:^(?!.*experts).*", False),
        (NAME, True),
        (NAME[:-1], False),
        ("Linear", True),
        ("Embedding", False),
    ],
)
def test_what_published_checkpoints_write(pattern: str, expected: bool) -> None:
    assert Patterns([pattern]).match(NAME) is expected


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*$", "(.*)*b$", "(a?){60}a{60}$", ".*.*.*.*.*.*.*.*b$"])
def test_expressions_that_take_python_forever_are_matched_or_refused_soon(expression: str) -> None:
    begin = time.monotonic()
    for _ in range(20):
        assert not Patterns([f"re:{expression}"]).match("a" * 60 + "!")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("patterns", "mentions"),
    [
        (["re:("], "not a regular expression"),
        (["re:a{99999999999}"], "not a regular expression"),
        (["re:" + "a" * 1001], "longer than 1,000"),
        (["re:(?i)a"], "flags"),
        ([r"re:(a*)*\1"], "not supported"),
        (["re:(?:a(?i:b))*"], "not supported"),
        ([f"re:{number}" for number in range(MAX_EXPRESSIONS + 1)], "more than"),
    ],
)
def test_what_cannot_be_used_is_refused(patterns: list[str], mentions: str) -> None:
    with pytest.raises(UnusablePatternError, match=mentions):
        Patterns(patterns).match("aab")


def test_the_experts_of_maverick_are_no_trouble() -> None:
    stem = "language_model.model.layers.{}.feed_forward.experts.{}.{}_proj"
    names = [stem.format(i, e, p) for i in range(1, 48, 2) for e in range(128) for p in ("gate", "up", "down")]
    usual = ("lm_head", "self_attn", "router", "experts.*gate.*", "experts.*up.*proj")
    patterns = Patterns([*(f"re:.*{text}" for text in usual), "re:vision_model.*"])
    assert sum(map(patterns.match, names)) == 2 * len(names) // 3


def test_all_names_together_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BUDGET", 20_000_000)
    patterns = Patterns(["re:(?:(?:a|b|.)*.)*x"])
    with pytest.raises(UnusablePatternError, match="take too long"):
        any(patterns.match(f"{'ab' * 40}{number}") for number in range(9_999))
