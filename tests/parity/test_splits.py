from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.parity.splits import Split, batch_splits, boundaries, one_call, single_row_splits


def starts(split: Split) -> list[int]:
    return [0, *accumulate(call.counts[0] for call in split.calls)][:-1]


def by_name(splits: tuple[Split, ...]) -> dict[str, Split]:
    return {split.name: split for split in splits}


@given(st.integers(2, 3000), st.integers(1, 600))
def test_every_split_feeds_every_token_once(length: int, chunk: int) -> None:
    for split in (one_call(length), *single_row_splits(length, chunk)):
        assert split.lengths == (length,)
        assert split.columns == length
        assert all(call.counts[0] > 0 for call in split.calls)


@given(st.integers(2, 3000), st.integers(1, 600))
def test_batches_have_rows_of_unequal_lengths_that_fit(length: int, chunk: int) -> None:
    for split in batch_splits(length, chunk):
        assert len(set(split.lengths)) == len(split.lengths) > 1
        assert split.columns <= length
        assert all(count > 0 for call in split.calls for count in call.counts)


@given(st.integers(2, 3000), st.integers(1, 600))
def test_token_by_token_is_bounded(length: int, chunk: int) -> None:
    assert all(len(split.calls) <= 60 for split in single_row_splits(length, chunk) if split.name == "token by token")


def test_the_splits_of_a_thousand_tokens_hit_what_goes_wrong() -> None:
    splits = by_name(single_row_splits(1000, 128))
    assert set(splits) == {"odd splits", "whole chunks", "token by token"}

    odd = splits["odd splits"]
    inside = [at for at in starts(odd)[1:] if at % 128]
    spans = [(at, at + call.counts[0]) for at, call in zip(starts(odd), odd.calls, strict=True)]
    assert odd.calls[0].counts == (1,)
    assert len(inside) > 8
    assert any(a // 128 + 1 < (b - 1) // 128 for a, b in spans), "one call spans more than two chunks"
    assert len({call.counts[0] % 2 for call in odd.calls}) == 2

    assert all(at % 128 == 0 for at in starts(splits["whole chunks"]))

    decode = splits["token by token"]
    single = {at for at, call in zip(starts(decode), decode.calls, strict=True) if call.counts == (1,)}
    around = [b for b in range(128, 1000, 128) if {b - 1, b, b + 1} <= single]
    assert len(around) >= 3
    assert {128, 896} <= set(around), "the first and the last boundary"
    assert decode.calls[0].counts[0] > 1, "a prompt comes before"


def test_without_a_boundary_single_tokens_end_the_text() -> None:
    splits = by_name(single_row_splits(50, 8192))
    assert "whole chunks" not in splits
    assert [call.counts for call in splits["token by token"].calls] == [(42,), *[(1,)] * 8]


def test_batches_decode_over_a_chunk_boundary_on_both_kinds_of_padding() -> None:
    left, right = batch_splits(1000, 128)
    assert [left.calls[0].padding, right.calls[0].padding] == ["left", "right"]
    prompts, lengths = left.calls[0].counts, left.lengths
    assert any(prompt // 128 < (length - 1) // 128 for prompt, length in zip(prompts, lengths, strict=True))
    assert prompts[0] < max(prompts) > prompts[-1], "the longest row is neither first nor last"


def test_texts_too_short_for_a_batch_have_none() -> None:
    assert batch_splits(11, 128) == ()
    assert batch_splits(12, 128)


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (0, 0)])
def test_boundaries_are_counted_between_tokens(length: int, expected: int) -> None:
    assert boundaries(length, 8) == expected
