"""Patterns that say which modules a quantization scheme is for, as compressed-tensors writes them.

A pattern is a module's name, the class of a module, or ``re:`` and a regular expression that must match from the
beginning of the name (compressed_tensors/utils/match.py). Expressions come from files that nobody vouches for, and
Python's own matcher can take exponential time. So they are parsed by Python, and all but the simplest are matched here
with sets of positions, within a budget of steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from l4convert.checkpoint.text import quote

#: Longer expressions are refused.
MAX_CHARACTERS = 1000
#: More expressions in one list are refused.
MAX_EXPRESSIONS = 256
# Steps of our own matcher, for all names that a list is asked about: about a second.
_MAX_STEPS = 1_000_000
# An expression with no more repetitions, none inside another, takes Python at most quadratic time.
_FEW = 2
_PARSER: Any = import_module("re._parser")  # the standard library's own parser has no public name


class UnusablePatternError(ValueError):
    """The argument says which pattern, and why it cannot be used."""


class Patterns:
    """A list of patterns.

    Args:
        patterns: As config.json has them.

    Raises:
        UnusablePatternError: One is no regular expression, or too long, or there are too many.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        given = list(patterns)
        self._names = frozenset(pattern for pattern in given if not pattern.startswith("re:"))
        expressions = [pattern.removeprefix("re:") for pattern in given if pattern.startswith("re:")]
        if len(expressions) > MAX_EXPRESSIONS:
            raise UnusablePatternError(f"{len(expressions):,} regular expressions, more than {MAX_EXPRESSIONS}")
        parsed = {expression: _parsed(expression) for expression in expressions}
        self._simple = [re.compile(text) for text, items in parsed.items() if _is_simple(items)]
        self._others = [(text, items) for text, items in parsed.items() if not _is_simple(items)]
        self._matcher = _Matcher()

    def match(self, name: str, kinds: Iterable[str] = ("Linear",)) -> bool:
        """Whether one of them is about a module.

        Args:
            name: The module's name in the checkpoint.
            kinds: The class of the module, and of what it derives from.

        Raises:
            UnusablePatternError: An expression uses what is not supported, or takes too long.
        """
        if name in self._names or not self._names.isdisjoint(kinds):
            return True
        if any(expression.match(name) for expression in self._simple):
            return True
        return any(self._matcher.match(text, items, name) for text, items in self._others)


def _parsed(expression: str) -> Any:
    if len(expression) > MAX_CHARACTERS:
        raise UnusablePatternError(f"{quote(expression)}: longer than {MAX_CHARACTERS:,} characters")
    try:
        items = _PARSER.parse(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise UnusablePatternError(f"{quote(expression)}: not a regular expression: {error}") from error
    if items.state.flags & ~re.UNICODE:
        raise UnusablePatternError(f"{quote(expression)}: flags are not supported in it")
    return items


def _is_simple(items: Any) -> bool:
    repeats = [op for op, _ in items if str(op) in ("MAX_REPEAT", "MIN_REPEAT")]
    bodies = [argument[2] for op, argument in items if str(op) in ("MAX_REPEAT", "MIN_REPEAT")]
    others = {str(op) for op, _ in items} - {"MAX_REPEAT", "MIN_REPEAT"}
    single = all(len(body) == 1 and str(body[0][0]) in _SINGLE for body in bodies)
    return len(repeats) <= _FEW and single and others <= {*_SINGLE, "AT"}


# Items that stand for exactly one character.
_SINGLE = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})


class _Matcher:
    """Matches parsed expressions by sets of positions, for at most ``_MAX_STEPS`` steps in its life."""

    def __init__(self) -> None:
        self._steps = 0

    def match(self, expression: str, items: Any, text: str) -> bool:
        try:
            return bool(self._ends(items, text, frozenset({0})))
        except RecursionError as error:
            raise UnusablePatternError(f"{quote(expression)}: nested too deeply") from error
        except UnusablePatternError as error:
            raise UnusablePatternError(f"{quote(expression)}: {error}") from error

    def _ends(self, items: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        """Where a match of these items can end, that begins at any of ``starts``."""
        for op, argument in items:
            if not starts:
                return starts
            self._steps += len(starts)
            if self._steps > _MAX_STEPS:
                raise UnusablePatternError("takes too long to match")
            starts = self._step(str(op), argument, text, starts)
        return starts

    def _step(self, op: str, argument: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        if op == "AT":
            return frozenset(at for at in starts if _at(str(argument), text, at))
        if op == "SUBPATTERN" and not any(argument[1:-1]):  # without flags of its own
            return self._ends(argument[-1], text, starts)
        if op == "BRANCH":
            return frozenset().union(*(self._ends(option, text, starts) for option in argument[1]))
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(argument, text, starts)
        if op in ("ASSERT", "ASSERT_NOT") and argument[0] > 0:
            wanted = op == "ASSERT"
            return frozenset(at for at in starts if bool(self._ends(argument[1], text, frozenset({at}))) == wanted)
        return frozenset(at + 1 for at in starts if at < len(text) and _is(op, argument, text[at]))

    def _repeated(self, argument: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        least, most, body = argument
        found: frozenset[int] = starts if least == 0 else frozenset()
        for count in range(1, min(int(most), len(text) + int(least)) + 1):
            following = self._ends(body, text, starts)
            settled = following == starts or (count >= least and following <= found)
            starts = following
            if count >= least or settled:
                found |= starts
            if settled or not starts:
                break
        return found


def _at(kind: str, text: str, at: int) -> bool:
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return at == 0
    if kind in ("AT_END", "AT_END_STRING"):
        return at == len(text)
    if kind in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
        before = at > 0 and _is_word(text[at - 1])
        after = at < len(text) and _is_word(text[at])
        return (before != after) == (kind == "AT_BOUNDARY")
    raise UnusablePatternError(f"{kind} is not supported in a regular expression")


def _is(op: str, argument: Any, character: str) -> bool:
    """Whether one character is one that an item stands for."""
    if op == "LITERAL":
        return bool(ord(character) == argument)
    if op == "NOT_LITERAL":
        return bool(ord(character) != argument)
    if op == "ANY":
        return character != "\n"
    if op == "IN":
        negated = str(argument[0][0]) == "NEGATE"
        return any(_is(str(kind), value, character) for kind, value in argument[negated:]) != negated
    if op == "RANGE":
        return bool(argument[0] <= ord(character) <= argument[1])
    if op == "CATEGORY":
        return _in_category(str(argument), character)
    raise UnusablePatternError(f"{op} is not supported in a regular expression")


def _in_category(category: str, character: str) -> bool:
    tests = {"DIGIT": str.isdigit, "SPACE": str.isspace, "WORD": _is_word}
    kind = category.removeprefix("CATEGORY_").removeprefix("NOT_")
    return tests[kind](character) != ("_NOT_" in category)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
