from __future__ import annotations

import numpy as np
import pytest

from l4convert.parity.feeding import feed
from l4convert.parity.splits import Call, Split, batch_splits, single_row_splits
from tests.parity.fakes import CHUNK, Fake, true_logits

RANDOM = np.random.default_rng(0)


def texts(lengths: tuple[int, ...]) -> list[np.ndarray]:
    return [RANDOM.integers(0, 128, length) for length in lengths]


@pytest.mark.parametrize("split", [*single_row_splits(60, CHUNK), *batch_splits(60, CHUNK)], ids=lambda s: s.name)
def test_pieces_put_together_are_the_logits_of_each_text(split: Split) -> None:
    rows = texts(split.lengths)
    got: list[list[np.ndarray]] = [[] for _ in rows]
    for piece in feed(Fake(), rows, split):
        assert piece.start == sum(map(len, got[piece.row]))
        got[piece.row].append(piece.logits)
    for ids, parts in zip(rows, got, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), true_logits(ids))


def test_rows_may_sit_out_a_call() -> None:
    split = Split("ragged", "", (Call((3, 1)), Call((0, 2), "right"), Call((1, 1))))
    rows = texts(split.lengths)
    pieces = [(piece.row, piece.start, len(piece.logits)) for piece in feed(Fake(), rows, split)]
    assert pieces == [(0, 0, 3), (1, 0, 1), (1, 1, 2), (0, 3, 1), (1, 3, 1)]


def test_padding_is_on_the_side_that_the_split_says() -> None:
    seen = []

    class Spy(Fake):
        def start(self, batch: int) -> Spy:  # type: ignore[override]
            return self

        def step(self, input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            seen.append((input_ids.tolist(), None if mask is None else mask.tolist()))
            return np.zeros((*input_ids.shape, 128), np.float32)

    split = Split("both", "", (Call((1, 2), "left"), Call((2, 1), "right"), Call((1, 1))))
    list(feed(Spy(), [np.array([5, 6, 7, 8]), np.array([15, 16, 17, 18])], split, pad_id=99))
    assert seen == [
        ([[99, 5], [15, 16]], [[0, 1], [1, 1]]),
        ([[6, 7], [17, 99]], [[1, 1], [1, 0]]),
        ([[8], [18]], None),
    ]


def test_texts_of_other_lengths_than_the_split_are_refused() -> None:
    with pytest.raises(ValueError, match=r"made for texts of \(3,\) tokens"):
        list(feed(Fake(), texts((4,)), Split("three", "", (Call((3,)),))))
