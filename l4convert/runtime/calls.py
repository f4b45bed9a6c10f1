"""Split and pack calls for graphs that write their caches in place.

Such a graph writes the new tokens of a row to consecutive slots (TensorRT's KVCacheUpdate, ONNX's TensorScatter), so
that a call's padding must come last, and a row must not cross a chunk boundary: a chunked layer's cache is one chunk
long. Callers need not know: their calls are packed here, and cut where some row reaches the end of its chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from l4convert.errors import UsageError
from l4convert.runtime.occupancy import Occupancy
from l4convert.runtime.runner import FloatArray, IntArray


@dataclass(frozen=True)
class InPlaceCall:
    """One call of the graph, a part of what was asked for.

    Attributes:
        lengths: Tokens of each row in the caches before the call, [B].
        counts: New tokens of each row, [B]; the columns after them are padding.
        columns: Which column of the original call each token is, [B, S]; 0 at padding.
    """

    lengths: IntArray
    counts: IntArray
    columns: IntArray

    @property
    def real(self) -> np.ndarray:
        """Where tokens are, bool [B, S]."""
        places: np.ndarray = np.arange(self.columns.shape[1]) < self.counts[:, None]
        return places

    def attention_mask(self, columns: int | None = None) -> IntArray:
        """The graph's mask, int64 [B, past + S]: 1 for every token in the caches and every new one.

        Args:
            columns: Its width; default: the least there can be. What is more is padding in front.
        """
        new = self.columns.shape[1]
        past = int(self.lengths.max()) if columns is None else columns - new
        if past < self.lengths.max():
            raise ValueError(f"a mask of {columns} columns cannot hold {self.lengths.max()} + {new} tokens")
        before = np.arange(past) >= past - self.lengths[:, None]
        return np.concatenate([before, self.real], axis=1).astype(np.int64)

    def take(self, array: IntArray) -> IntArray:
        """The call's part of an array [B, columns of the original call]."""
        return np.take_along_axis(array, self.columns, axis=1)

    def put(self, logits: FloatArray, result: FloatArray) -> None:
        """Copy the logits of the call's tokens [B, S, vocabulary] to their places in those of the original call."""
        row, place = np.nonzero(self.real)
        result[row, self.columns[row, place]] = logits[row, place]


def in_place_calls(lengths: IntArray, mask: IntArray, chunk: int, limit: int | None = None) -> Iterator[InPlaceCall]:
    """The calls that do what one call with this mask asks for.

    Args:
        lengths: Tokens of each row in the caches, [B].
        mask: [B, S], 1 for a token and 0 for padding, which may be anywhere.
        chunk: C, the chunk size.
        limit: The most columns of a call.
    """
    order = np.argsort(mask == 0, axis=1, kind="stable")  # the columns of a row's tokens come first
    left = mask.sum(axis=1)
    done = np.zeros_like(left)
    while left.any():
        now = lengths + done
        width = int(min(left.max(), (chunk - now % chunk).min(), limit or left.max()))
        counts = np.minimum(left, width)
        places = np.minimum(done[:, None] + np.arange(width), mask.shape[1] - 1)
        columns = np.take_along_axis(order, places, axis=1)
        yield InPlaceCall(now, counts, np.where(np.arange(width) < counts[:, None], columns, 0))
        done, left = done + counts, left - counts


def calls_in_room(
    occupancy: Occupancy, mask: IntArray, chunk: int, max_length: int, limit: int | None = None
) -> Iterator[InPlaceCall]:
    """As :func:`in_place_calls`, one after the other, where padding, too, must lie within the caches.

    Args:
        occupancy: Brought up to date after each call.
        mask: [B, S], 1 for a token; ``chunk``: C; ``limit``: the most columns of a call.
        max_length: Slots of the caches of global layers.

    Raises:
        UsageError: A row has as many tokens as there are slots, and others go on.
    """
    left = mask.copy()
    while left.any():
        room = max_length - int(occupancy.lengths.max())
        if room < 1:
            raise UsageError(
                f"a sequence of the batch has all {max_length} tokens that there is room for, and the others go on",
                "Make room for longer sequences, or end that sequence's batch.",
            )
        call = next(in_place_calls(occupancy.lengths, left, chunk, min(room, limit or room)))
        yield call
        occupancy.append(call.real.astype(np.int64))
        row, place = np.nonzero(call.real)
        left[row, call.columns[row, place]] = 0
