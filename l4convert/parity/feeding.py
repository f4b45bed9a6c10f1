"""Carry out a split: feed texts to a runner as it says, and give the logits of each text as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from l4convert.parity.splits import Call, Split
from l4convert.runtime.runner import FloatArray, IntArray, Runner


@dataclass(frozen=True)
class Piece:
    """Logits of consecutive tokens of one text.

    Attributes:
        row: Which text; ``start``: the position of the first of the tokens; ``logits``: [tokens, vocabulary].
    """

    row: int
    start: int
    logits: FloatArray

    @property
    def tokens(self) -> slice:
        """Positions in the text."""
        return slice(self.start, self.start + len(self.logits))


def feed(runner: Runner, texts: Sequence[IntArray], split: Split, pad_id: int = 0) -> Iterator[Piece]:
    """Feed ``texts`` (each [tokens]) in the calls of ``split``.

    Args:
        runner: The model.
        texts: As many as the split has rows, as long as it says.
        split: The calls.
        pad_id: Token to put at padding; what it is must not matter.
    """
    if split.lengths != tuple(len(text) for text in texts):
        raise ValueError(f"{split.name}: made for texts of {split.lengths} tokens")
    stream = runner.start(len(texts))
    starts = [0] * len(texts)
    for call in split.calls:
        ids, mask = _padded(texts, starts, call, pad_id)
        logits = stream.step(ids, None if mask.all() else mask)
        for row, count in enumerate(call.counts):
            if count:
                yield Piece(row, starts[row], logits[row][mask[row] == 1])
            starts[row] += count


def _padded(texts: Sequence[IntArray], starts: Sequence[int], call: Call, pad_id: int) -> tuple[IntArray, IntArray]:
    """The call's ``input_ids`` and mask, [B, S] each."""
    width = max(call.counts)
    ids = np.full((len(texts), width), pad_id, np.int64)
    mask = np.zeros((len(texts), width), np.int64)
    for row, (text, start, count) in enumerate(zip(texts, starts, call.counts, strict=True)):
        columns = slice(width - count, width) if call.padding == "left" else slice(0, count)
        ids[row, columns] = text[start : start + count]
        mask[row, columns] = 1
    return ids, mask
