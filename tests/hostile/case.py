"""What a hostile case is: a valid input, one way to damage it, and what the refusal must say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        damage: Changes the valid input, a folder that is this case's own.
        names: What the error line (or its hint) must contain: the file, and the tensor or key where there is one.
        exit_code: Where it is not the family's; 0: it looks bad and is harmless, so it must be taken
            within the limits.
    """

    damage: Damage
    names: tuple[str, ...]
    exit_code: int | None = None


@dataclass(frozen=True)
class Family:
    """A class of hostile inputs.

    Attributes:
        base: Writes the valid input into a folder; the command succeeds on it.
        cases: By name; a name says what is wrong.
        command: Arguments; ``{input}``, ``{out}`` and ``{room}`` (the folder that holds both) are replaced.
        exit_code: 3, bad input, or 4, a check that failed.
        real: Whether its first case also runs as a user runs it; one family of a kind is enough.
    """

    base: Callable[[Path], object]
    cases: Mapping[str, Case]
    command: tuple[str, ...] = ("convert", "{input}", "--output", "{out}", "--recipe", "none")
    exit_code: int = 3
    real: bool = True


def harmless(damage: Damage) -> Case:
    """What would hurt a careless reader, and is taken without harm by this one."""
    return Case(damage, (), 0)


def cases(table: Mapping[str, tuple[Damage, tuple[str, ...]]]) -> dict[str, Case]:
    """Cases of the family's own exit code, written as ``name: (damage, names)``."""
    return {name: Case(damage, names) for name, (damage, names) in table.items()}
