"""Compare texts that are too long for one call: in steps, beside the reference, with a few steps' logits in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from l4convert.checkpoint.config import DecoderConfig
from l4convert.parity.at_once import AtOnce, spread, total_tokens
from l4convert.parity.by_length import TextComparison
from l4convert.parity.lockstep import Compared, compare_in_frames
from l4convert.parity.outcome import SplitRow
from l4convert.parity.splits import Split, joined, one_row, row_of, steps
from l4convert.parity.steps import reference_limit, reference_steps
from l4convert.parity.trial import Trial
from l4convert.runtime.prefill import step_limit
from l4convert.runtime.runner import IntArray

_BASE = "steps"


@dataclass(frozen=True)
class InSteps:
    """Every window in steps.

    Attributes:
        windows: Texts [tokens], the longest first.
        single: The other ways of feeding the first one; ``batch``: batches of parts of all of them.
        too_many: Texts of the batches that were left out, because the artifact's runner takes fewer; 0: none were.
        beginning: Instead of ``single`` and ``batch``, for what has only one stream at a time: the splits of the first
            window's beginning.
    """

    windows: Sequence[IntArray]
    single: Sequence[Split]
    batch: Sequence[Split]
    too_many: int = 0
    beginning: AtOnce | None = None

    @property
    def tokens(self) -> int:
        """How many tokens a task counts over all of it."""
        more = self.beginning.tokens if self.beginning else 0
        return total_tokens(self.windows, self.single, self.batch) + more

    def rows(self, trial: Trial, text: TextComparison) -> Iterator[SplitRow]:
        """The rows of the report; ``text`` takes in what is measured in the first."""
        bases = [base_of(len(ids), trial.config) for ids in self.windows]
        others = _window(trial, self.windows[0], bases[0], self.single, text)
        for ids, base in zip(self.windows[1:], bases[1:], strict=True):
            _window(trial, ids, base, (), text)
        calls, lengths = sum(len(base.calls) for base in bases), [len(ids) for ids in self.windows]
        yield trial.whole(_BASE, bases[0].description, lengths, calls, text.whole.result())
        if self.batch:
            others += _batch(trial, spread(self.windows, self.batch[0].lengths), self.batch)
        for one in others:
            yield trial.other(one.split, _BASE, one.reference.result(), one.drift.result())
        if self.beginning:
            _, *rows = self.beginning.rows(trial, TextComparison(len(self.beginning.windows[0])))
            yield from rows


def base_of(length: int, config: DecoderConfig) -> Split:
    """How the artifact is fed a window of ``length`` tokens alone."""
    return steps(length, config.attention_chunk_size, partial(step_limit, config))


def batch_limit(config: DecoderConfig, context: int, rows: int) -> int:
    """The most tokens of a row in one call of a batch, and of the reference beside it."""
    return min(step_limit(config, context, rows), reference_limit(config, context))


def _window(
    trial: Trial, ids: IntArray, base: Split, splits: Sequence[Split], text: TextComparison
) -> tuple[Compared, ...]:
    return compare_in_frames(
        trial.artifact,
        trial.reference,
        [ids],
        frames=one_row("frames", "", reference_steps(len(ids), trial.config)),
        own=[base],
        splits=splits,
        task=trial.task,
        pad_id=trial.pad_id,
        text=text,
    )


def _batch(trial: Trial, texts: Sequence[IntArray], batch: Sequence[Split]) -> tuple[Compared, ...]:
    """Each text alone, and all of them together; the frames are the batch's own calls, so that no row runs ahead."""
    frames = joined(batch[0], batch_limit(trial.config, max(map(len, texts)), len(texts)))
    return compare_in_frames(
        trial.artifact,
        trial.reference,
        texts,
        frames=frames,
        own=[row_of(frames, row) for row in range(len(texts))],
        splits=batch,
        task=trial.task,
        pad_id=trial.pad_id,
    )
