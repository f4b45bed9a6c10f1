"""What a pass is: a function from a graph to itself, and an account of what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from l4convert.quantization.recipe import Recipe


@dataclass(frozen=True)
class PassReport:
    """What one run of a pass did.

    Attributes:
        name: The pass.
        fired: How many places it rewrote.
        skipped: (node or tensor, reason) for each place that looked like one but was left alone.
        notes: (node or tensor, remark) for each place where a user should know how it was rewritten.
    """

    name: str
    fired: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    """Filled by a pass while it runs."""

    fired: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, where: str | None, reason: str) -> None:
        """Record one place that was left alone, and why."""
        self.skipped.append((where or "(unnamed)", reason))

    def note(self, where: str, remark: str) -> None:
        """Record what a user should know about one place."""
        self.notes.append((where, remark))


@dataclass(frozen=True)
class Pass:
    """One row of the table of passes.

    Attributes:
        name: Verb and object, as its file.
        summary: One line for ``l4convert passes``.
        run: Rewrites the model in place. Running it again finds nothing more to do.
        exact: The outputs stay the same up to floating-point reassociation; False for quantization.
    """

    name: str
    summary: str
    run: Callable[[ir.Model, Recipe], Outcome]
    exact: bool = True

    def __call__(self, model: ir.Model, recipe: Recipe) -> PassReport:
        outcome = self.run(model, recipe)
        return PassReport(self.name, outcome.fired, tuple(outcome.skipped), tuple(outcome.notes))
