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
from math import factorial
from typing import Any

from l4convert.checkpoint.text import quote

#: Longer expressions are refused.
MAX_CHARACTERS = 1000
#: More expressions in one list are refused.
MAX_EXPRESSIONS = 256
# What a list may cost for all names that it is asked about, in nanoseconds or so: a few seconds. Nine thousand modules
# (Maverick's experts) times one expression with three repetitions, or twenty with two, cost half of it.
_BUDGET = 1_000_000_000
_STEP_COST = 1000  # of our own matcher
# With n repetitions, none inside another, Python takes about (characters of the name)^n / n! steps at most.
_FEW = 3
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
        expressions = sorted({pattern.removeprefix("re:") for pattern in given if pattern.startswith("re:")})
        if len(expressions) > MAX_EXPRESSIONS:
            raise UnusablePatternError(f"{len(expressions):,} regular expressions, more than {MAX_EXPRESSIONS}")
        self._expressions = [_Expression(text, _parsed(text)) for text in expressions]
        self._budget = _Budget()

    def match(self, name: str, kinds: Iterable[str] = ("Linear",)) -> bool:
        """Whether one of them is about a module: see :meth:`find`."""
        return not self._names.isdisjoint(kinds) or self.find(name) is not None

    def find(self, name: str, kinds: Iterable[str] = ()) -> str | None:
        """The pattern that decides about a module: its name, else an expression, else a class, the first in
        alphabetical order, as in the library's ``match_targets``; None where no pattern is about it.

        Args:
            name: The module's name in the checkpoint.
            kinds: The class of the module, and of what it derives from.

        Raises:
            UnusablePatternError: An expression uses what is not supported, or takes too long.
        """
        if name in self._names:
            return name
        found = next((each.text for each in self._expressions if each.match(name, self._budget)), None)
        return f"re:{found}" if found is not None else min(self._names.intersection(kinds), default=None)


class _Expression:
    """A parsed expression, matched by Python where that cannot take long."""

    def __init__(self, text: str, items: Any) -> None:
        self.text, self._items, self._repeats = text, items, _repeats(items)
        self._simple = re.compile(text) if _is_simple(items) else None

    def match(self, name: str, budget: _Budget) -> bool:
        if self._simple is None:
            return _Matcher(budget).match(self.text, self._items, name)
        budget.spend(max(1, len(name)) ** self._repeats // factorial(self._repeats))
        return self._simple.match(name) is not None


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
    bodies = [argument[2] for op, argument in items if str(op) in _REPEATS]
    others = {str(op) for op, _ in items} - _REPEATS
    return _repeats(items) <= _FEW and all(map(_is_single, bodies)) and others <= {*_SINGLE, "AT"}


def _repeats(items: Any) -> int:
    """How many repetitions there are; one at the end that may be empty decides nothing."""
    ends_freely = bool(items) and str(items[-1][0]) in _REPEATS and items[-1][1][0] == 0
    return sum(str(op) in _REPEATS for op, _ in items) - ends_freely


def _is_single(body: Any) -> bool:
    return len(body) == 1 and str(body[0][0]) in _SINGLE


_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT"})
# Items that stand for exactly one character.
_SINGLE = frozenset({"LITERAL", "NOT_LITERAL", "ANY", "IN"})


class _Budget:
    """Counts what matching costs."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise UnusablePatternError("its expressions take too long to match")


class _Matcher:
    """Matches parsed expressions by sets of positions."""

    def __init__(self, budget: _Budget) -> None:
        self._budget = budget

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
            self._budget.spend(_STEP_COST * len(starts))
            starts = self._step(str(op), argument, text, starts)
        return starts

    def _step(self, op: str, argument: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        if op == "AT":
            return frozenset(at for at in starts if _at(str(argument), text, at))
        if op == "SUBPATTERN" and not any(argument[1:-1]):  # without flags of its own
            return self._ends(argument[-1], text, starts)
        if op == "BRANCH":
            return frozenset().union(*(self._ends(option, text, starts) for option in argument[1]))
        if op in _REPEATS:
            return self._repeated(argument, text, starts)
        if op in ("ASSERT", "ASSERT_NOT") and argument[0] > 0:
            wanted = op == "ASSERT"
            return frozenset(at for at in starts if bool(self._ends(argument[1], text, frozenset({at}))) == wanted)
        return frozenset(at + 1 for at in starts if at < len(text) and _is(op, argument, text[at]))

    def _repeated(self, argument: Any, text: str, starts: frozenset[int]) -> frozenset[int]:
        least, most, body = argument
        if _is_single(body) and least <= 1 and most >= len(text):
            return self._run(body[0], text, starts, least)
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

    def _run(self, item: Any, text: str, starts: frozenset[int], least: int) -> frozenset[int]:
        """Ends of any number of the same character, at least ``least`` (0 or 1)."""
        op, argument = str(item[0]), item[1]
        found = set(starts) if least == 0 else set()
        self._budget.spend(_STEP_COST * len(text))
        running = False
        for at in range(min(starts), len(text)):
            running = (running or at in starts) and _is(op, argument, text[at])
            if running:
                found.add(at + 1)
        return frozenset(found)


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
