"""What a validation found: plain data, and its JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l4convert import __version__
from l4convert.errors import InputError
from l4convert.parity.by_length import LengthRow
from l4convert.parity.metrics import Metrics
from l4convert.parity.policy import Policy

SCHEMA = "l4convert.parity/1"
REPORT_FILE = "parity.json"


@dataclass(frozen=True)
class TextUsed:
    """The text of a validation.

    Attributes:
        source: Where it came from, in words.
        random: Made up, because none was given.
        tokens: How many were used, in so many ``windows`` of at most ``window`` tokens.
    """

    source: str
    random: bool
    tokens: int
    windows: int
    window: int


@dataclass(frozen=True)
class SplitRow:
    """One way of feeding the text.

    Attributes:
        name, description: Which.
        calls: How many calls of the model it took.
        boundaries: Chunk boundaries inside the texts.
        metrics: The artifact against the reference.
        drift: The artifact against its own single call; None for the single call itself.
        failures: Why it is not good enough; empty where it is.
    """

    name: str
    description: str
    calls: int
    boundaries: int
    metrics: Metrics
    drift: Metrics | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was compared."""
        return not self.failures and self.metrics.tokens > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "description": self.description,
            "calls": self.calls,
            "boundaries": self.boundaries,
            "passed": self.passed,
            "failures": list(self.failures),
            "reference": self.metrics.to_json(),
            "drift": None if self.drift is None else self.drift.to_json(),
        }


@dataclass(frozen=True)
class ParityReport:
    """The outcome of a validation.

    Attributes:
        artifact: Name of the artifact's folder; ``reference``: what it was compared with.
        recipe, target, kv_cache: What the manifest says.
        text: What it was run on; ``policy``: what it was held to.
        rows: One for each way of feeding; the first has the whole text.
        by_length: The first row's measures by position in the window, the first positions first.
        notes: What a reader should know to believe the numbers.
    """

    artifact: str
    reference: str
    recipe: str
    target: str
    kv_cache: str
    text: TextUsed
    policy: Policy
    rows: tuple[SplitRow, ...]
    notes: tuple[str, ...]
    by_length: tuple[LengthRow, ...] = ()

    @property
    def passed(self) -> bool:
        """Every row passed, and there is one."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[str, ...]:
        """Every reason, with its row's name."""
        reasons = tuple(f"{row.name}: {reason}" for row in self.rows for reason in row.failures)
        return reasons or (() if self.rows else ("nothing was compared",))

    @property
    def whole(self) -> Metrics:
        """The measures on the whole text, in one call a window."""
        return self.rows[0].metrics

    def to_json(self) -> dict[str, Any]:
        """Plain values, of schema ``l4convert.parity/1``."""
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "passed": self.passed,
            "artifact": self.artifact,
            "reference": self.reference,
            "recipe": self.recipe,
            "target": self.target,
            "kv_cache": self.kv_cache,
            "text": asdict(self.text),
            "policy": asdict(self.policy),
            "rows": [row.to_json() for row in self.rows],
            "by_length": [row.to_json() for row in self.by_length],
            "failures": list(self.failures),
            "notes": list(self.notes),
        }


def write_report(report: ParityReport, file: Path) -> None:
    """Write a report's JSON, whole or not at all.

    Raises:
        InputError: The file cannot be written.
    """
    content = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    write_text(file, content)


def write_text(file: Path, content: str) -> None:
    """Write a text file by way of a neighbour, so that a reader never sees half of it."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
