"""Calls for graphs that write in place: every token once, in order, within a chunk, padding last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4convert.runtime.calls import InPlaceCall, in_place_calls


@st.composite
def requests(draw):
    """(lengths [B], mask [B,S], chunk, limit): any padding, rows without a token too."""
    batch, width = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    chunk = draw(st.integers(1, 12))
    rows = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    mask = np.array(draw(st.lists(rows, min_size=batch, max_size=batch)))
    lengths = np.array(draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)))
    return lengths, mask, chunk, draw(st.none() | st.integers(1, 6))


@given(requests())
def test_every_token_is_fed_once_and_in_order(request_):
    lengths, mask, chunk, limit = request_
    fed: list[list[int]] = [[] for _ in lengths]
    for call in in_place_calls(lengths, mask, chunk, limit):
        assert np.array_equal(call.lengths, lengths + [len(row) for row in fed])  # what came before is in the caches
        for row, columns in enumerate(fed):
            columns.extend(call.columns[row, : call.counts[row]].tolist())
    assert fed == [np.flatnonzero(row).tolist() for row in mask]


@given(requests())
def test_no_row_of_a_call_leaves_its_chunk_padding_included(request_):
    lengths, mask, chunk, limit = request_
    for call in in_place_calls(lengths, mask, chunk, limit):
        width = call.columns.shape[1]
        assert (call.lengths % chunk + width <= chunk).all()
        assert 0 < width <= (limit or width)
        assert call.counts.max() == width  # no column of a call is padding in every row


@given(requests())
def test_no_row_writes_past_the_columns_that_were_asked_for(request_):
    """A buffer with a slot for every column, past and new, is large enough: padding is written, too."""
    lengths, mask, chunk, limit = request_
    for call in in_place_calls(lengths, mask, chunk, limit):
        assert (call.lengths + call.columns.shape[1] <= lengths + mask.shape[1]).all()


@given(requests(), st.integers(0, 5))
def test_masks_have_padding_in_front_and_behind_only(request_, extra):
    lengths, mask, chunk, limit = request_
    for call in in_place_calls(lengths, mask, chunk, limit):
        width, past = call.columns.shape[1], int(call.lengths.max())
        least = call.attention_mask()
        assert least.shape == (len(lengths), past + width)
        assert least.dtype == np.int64
        assert np.array_equal(least[:, :past].sum(axis=1), call.lengths)
        assert np.array_equal(least[:, past:].sum(axis=1), call.counts)
        for row in least:  # 0..0 1..1 0..0
            changes = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
            assert len(changes) in {0, 2}
        wide = call.attention_mask(columns=past + width + extra)
        assert not wide[:, :extra].any()
        assert np.array_equal(wide[:, extra:], least)
        with pytest.raises(ValueError, match="cannot hold"):
            call.attention_mask(columns=past + width - 1)


@given(requests())
def test_logits_and_tokens_go_through_the_same_places(request_):
    """A model whose logits are the token itself gives every token back at its place, and nothing elsewhere."""
    lengths, mask, chunk, limit = request_
    ids = np.arange(1, mask.size + 1).reshape(mask.shape)
    result = np.zeros((*mask.shape, 2), np.float32)
    for call in in_place_calls(lengths, mask, chunk, limit):
        taken = call.take(ids)
        assert taken.shape == call.columns.shape
        call.put(np.stack([taken, -taken], axis=-1).astype(np.float32), result)
    assert np.array_equal(result[..., 0], np.where(mask, ids, 0))
    assert np.array_equal(result[..., 1], np.where(mask, -ids, 0))


def test_a_batch_is_cut_where_a_row_reaches_its_boundary():
    """Rows at 6 and 1 of chunks of 8, five tokens each: two, then the boundary of row 0, then three."""
    calls = list(in_place_calls(np.array([6, 1]), np.ones((2, 5), np.int64), chunk=8))
    assert [call.columns.shape[1] for call in calls] == [2, 3]
    assert [call.lengths.tolist() for call in calls] == [[6, 1], [8, 3]]


def test_tokens_between_padding_are_packed_to_the_front():
    (call,) = in_place_calls(np.array([0, 3]), np.array([[0, 1, 0, 1], [0, 0, 1, 0]]), chunk=8)
    assert call.columns.tolist() == [[1, 3], [2, 0]]
    assert call.real.tolist() == [[True, True], [True, False]]
    assert call.attention_mask().tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 0]]


def test_nothing_to_feed_is_no_call():
    assert list(in_place_calls(np.array([3]), np.zeros((1, 4), np.int64), chunk=8)) == []


def test_a_mask_cannot_be_narrower_than_the_longest_row():
    call = InPlaceCall(np.array([2, 5]), np.array([1, 1]), np.array([[0], [0]]))
    with pytest.raises(ValueError, match=r"a mask of 5 columns cannot hold 5 \+ 1 tokens"):
        call.attention_mask(columns=5)
