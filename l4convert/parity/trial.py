"""A validation under way: the two models, and how what was measured becomes rows of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.parity.metrics import Metrics
from l4convert.parity.outcome import SplitRow
from l4convert.parity.policy import ELEMENTWISE, Policy
from l4convert.parity.reference import Reference
from l4convert.parity.splits import Split, boundaries
from l4convert.progress import Task
from l4convert.runtime.runner import Runner


@dataclass(frozen=True)
class Trial:
    """A validation under way: what is compared with what, and what it is held to.

    Attributes:
        artifact: What is judged; ``reference``: what it is compared with; ``policy``: what it is held to.
        config: The model's hyperparameters.
        task: Counts tokens.
    """

    artifact: Runner
    reference: Reference
    policy: Policy
    config: DecoderConfig
    task: Task

    @property
    def pad_id(self) -> int:
        """Token to put at padding."""
        return self.config.pad_token_id or 0

    def whole(self, base: str, description: str, lengths: Sequence[int], calls: int, metrics: Metrics) -> SplitRow:
        """The row of the whole text, to which all limits apply."""
        failures = (*metrics.problems(), *self.policy.reference.broken_by(metrics))
        return SplitRow(base, description, calls, self.crossed(lengths), metrics, None, failures)

    def other(self, split: Split, base: str, metrics: Metrics, drift: Metrics) -> SplitRow:
        """The row of another split, which is also held against the artifact's own logits of ``base``."""
        failures = (
            *metrics.problems(),
            *self.policy.reference.broken_by(metrics, only=ELEMENTWISE),
            *(f"drift from {base}: {line}" for line in (*drift.problems(), *self.policy.drift.broken_by(drift))),
        )
        crossed = self.crossed(split.lengths)
        return SplitRow(split.name, split.description, len(split.calls), crossed, metrics, drift, failures)

    def crossed(self, lengths: Sequence[int]) -> int:
        """Chunk boundaries inside texts of these lengths."""
        return sum(boundaries(length, self.config.attention_chunk_size) for length in lengths)
