"""Compare texts that are short enough: each in one call, with all of its logits in memory, and then in other splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from l4convert.parity.by_length import TextComparison
from l4convert.parity.feeding import feed
from l4convert.parity.metrics import NO_TARGET, Comparison, measure
from l4convert.parity.outcome import SplitRow
from l4convert.parity.splits import Split, one_call
from l4convert.parity.trial import Trial
from l4convert.runtime.runner import FloatArray, IntArray

_BASE = "one call"


@dataclass(frozen=True)
class AtOnce:
    """Every window in one call.

    Attributes:
        windows: Texts [tokens], the longest first.
        single: The other ways of feeding the first one; ``batch``: batches of parts of all of them.
        too_many: Texts of the batches that were left out, because the artifact's runner takes fewer; 0: none were.
    """

    windows: Sequence[IntArray]
    single: Sequence[Split]
    batch: Sequence[Split]
    too_many: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens a task counts over all of it."""
        return total_tokens(self.windows, self.single, self.batch)

    def rows(self, trial: Trial, text: TextComparison) -> Iterator[SplitRow]:
        """The rows of the report; ``text`` takes in what is measured in the first."""
        first = _measure(trial, self.windows[0])
        text.add(0, measure(first.reference, first.own, first.targets))
        for ids in self.windows[1:]:
            other = _measure(trial, ids)
            text.add(0, measure(other.reference, other.own, other.targets))
        lengths = [len(ids) for ids in self.windows]
        yield trial.whole(_BASE, "every window at once", lengths, len(lengths), text.whole.result())
        for split in self.single:
            yield _row(trial, split, [first])
        if self.batch:
            texts = [_measure(trial, ids) for ids in spread(self.windows, self.batch[0].lengths)]
            for split in self.batch:
                yield _row(trial, split, texts)


@dataclass(frozen=True)
class _Text:
    """One text [tokens] and its logits [tokens, vocabulary]: the reference's, and the artifact's in one call."""

    ids: IntArray
    reference: FloatArray
    own: FloatArray

    @property
    def targets(self) -> IntArray:
        """The next token of each token, [tokens]."""
        return np.append(self.ids[1:], NO_TARGET)


def _measure(trial: Trial, ids: IntArray) -> _Text:
    reference = trial.reference.logits(ids)
    (piece,) = feed(trial.artifact, [ids], one_call(len(ids)), trial.pad_id)
    trial.task.advance(len(ids))
    return _Text(ids, reference, piece.logits)


def _row(trial: Trial, split: Split, texts: Sequence[_Text]) -> SplitRow:
    against_reference, drifted = Comparison(), Comparison()
    for piece in feed(trial.artifact, [text.ids for text in texts], split, trial.pad_id):
        text, tokens = texts[piece.row], piece.tokens
        against_reference.update(text.reference[tokens], piece.logits, text.targets[tokens])
        drifted.update(text.own[tokens], piece.logits)
        trial.task.advance(len(piece.logits))
    return trial.other(split, _BASE, against_reference.result(), drifted.result())


def spread(windows: Sequence[IntArray], lengths: Sequence[int]) -> list[IntArray]:
    """Texts of the given lengths from different places, so that a row that sees another's tokens shows."""
    ids = np.concatenate(windows)
    last = max(1, len(lengths) - 1)
    return [ids[(len(ids) - length) * row // last :][:length] for row, length in enumerate(lengths)]


def total_tokens(windows: Sequence[IntArray], single: Sequence[Split], batch: Sequence[Split]) -> int:
    """Tokens over all: of the windows, of the first one in each split, and of the batch alone and in each split."""
    alone = sum(batch[0].lengths) if batch else 0
    return sum(map(len, windows)) + len(windows[0]) * len(single) + alone * (1 + len(batch))
