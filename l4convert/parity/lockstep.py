"""Compare while feeding: the reference goes ahead frame by frame, and everything else follows it piece by piece.

So the logits of a frame are all that is held of the reference, which is computed once however many ways of feeding the
artifact there are, and memory does not grow with the text but by the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from l4convert.parity.by_length import TextComparison
from l4convert.parity.feeding import Piece, feed
from l4convert.parity.metrics import NO_TARGET, Comparison, measure
from l4convert.parity.reference import Reference, ReferenceStream
from l4convert.parity.splits import Split
from l4convert.progress import Task
from l4convert.runtime.runner import FloatArray, IntArray, Runner


@dataclass(frozen=True)
class Compared:
    """What came of one split: the artifact against the reference, and against its own steps."""

    split: Split
    reference: Comparison = field(default_factory=Comparison)
    drift: Comparison = field(default_factory=Comparison)


class Pieces:
    """The pieces of a feed, handed out up to any positions, in order.

    Args:
        pieces: As :func:`~l4convert.parity.feeding.feed` gives them.
        rows: Of how many texts.
    """

    def __init__(self, pieces: Iterator[Piece], rows: int) -> None:
        self._pieces = pieces
        self._at = [0] * rows
        self._kept: list[list[Piece]] = [[] for _ in range(rows)]

    def until(self, stops: Sequence[int]) -> Iterator[Piece]:
        """All that was not handed out yet of each row's positions before its stop; no more is asked of the feed."""
        for row, stop in enumerate(stops):
            kept, self._kept[row] = self._kept[row], []
            for piece in kept:
                yield from self._take(piece, stop)
        while any(at < stop for at, stop in zip(self._at, stops, strict=True)):
            piece = next(self._pieces)
            yield from self._take(piece, stops[piece.row])

    def _take(self, piece: Piece, stop: int) -> Iterator[Piece]:
        count = min(max(stop - piece.start, 0), len(piece.logits))
        if count:
            self._at[piece.row] += count
            yield Piece(piece.row, piece.start, piece.logits[:count])
        if count < len(piece.logits):
            self._kept[piece.row].append(Piece(piece.row, piece.start + count, piece.logits[count:]))


def compare_in_frames(
    artifact: Runner,
    reference: Reference,
    texts: Sequence[IntArray],
    *,
    frames: Split,
    own: Sequence[Split],
    splits: Sequence[Split],
    task: Task,
    pad_id: int = 0,
    text: TextComparison | None = None,
) -> tuple[Compared, ...]:
    """Feed ``texts`` to the reference and, in several ways, to the artifact.

    Args:
        artifact: What is judged; ``len(own) + len(splits)`` streams of it are open at once.
        reference: What it is compared with; each text has a stream.
        texts: Token ids, each [tokens].
        frames: The reference's calls, each text alone.
        own: For each text, how the artifact is fed it alone: what ``splits`` are held against, too.
        splits: Other ways of feeding all the texts.
        task: Counts tokens: of each text, and of each text in each split.
        pad_id: Token to put at padding.
        text: Takes in the artifact's ``own`` logits against the reference's.

    Returns:
        The comparisons of ``splits``, in order.
    """
    streams = [reference.stream() for _ in texts]
    alone = [Pieces(feed(artifact, [ids], split, pad_id), 1) for ids, split in zip(texts, own, strict=True)]
    others = [Pieces(feed(artifact, texts, split, pad_id), len(texts)) for split in splits]
    found = tuple(Compared(split) for split in splits)
    targets = [np.append(ids[1:], NO_TARGET) for ids in texts]
    starts = [0] * len(texts)
    for call in frames.calls:
        stops = [start + count for start, count in zip(starts, call.counts, strict=True)]
        spans = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
        wanted = [_step(stream, ids[span]) for stream, ids, span in zip(streams, texts, spans, strict=True)]
        given = [_joined(pieces.until([stop])) for pieces, stop in zip(alone, stops, strict=True)]
        for row, span in enumerate(spans):
            if text is not None and call.counts[row]:
                text.add(span.start, measure(wanted[row], given[row], targets[row][span]))
            task.advance(call.counts[row])
        for pieces, compared in zip(others, found, strict=True):
            for piece in pieces.until(stops):
                inside = slice(piece.start - starts[piece.row], piece.tokens.stop - starts[piece.row])
                compared.reference.update(wanted[piece.row][inside], piece.logits, targets[piece.row][piece.tokens])
                compared.drift.update(given[piece.row][inside], piece.logits)
                task.advance(len(piece.logits))
        starts = stops
    return found


def _step(stream: ReferenceStream, ids: IntArray) -> FloatArray:
    """A step of the reference; a text that sits out a frame has no logits of it."""
    return stream.step(ids) if len(ids) else np.zeros((0, 0), np.float32)


def _joined(pieces: Iterator[Piece]) -> FloatArray:
    """The logits of consecutive pieces as one array [tokens, vocabulary]; often there is only one."""
    parts = [piece.logits for piece in pieces]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
