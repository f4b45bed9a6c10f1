"""A batch of sequences that is fed to an artifact: forward, back again, and in copies."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from l4convert.errors import UsageError
from l4convert.runtime.caches import KvCacheState
from l4convert.runtime.calls import calls_in_room
from l4convert.runtime.history import TokenHistory, plan_return
from l4convert.runtime.manifest import ArtifactInfo
from l4convert.runtime.occupancy import Occupancy
from l4convert.runtime.prefill import prefill_steps, step_limit
from l4convert.runtime.runner import FloatArray, IntArray, check_step, check_vocabulary


class Graph(Protocol):
    """What a stream needs of its session."""

    @property
    def info(self) -> ArtifactInfo:
        """The artifact."""
        ...

    @property
    def max_length(self) -> int:
        """How many tokens a sequence can have."""
        ...

    def run(self, cache: KvCacheState, input_ids: IntArray, mask: IntArray) -> FloatArray:
        """One call of the graph: logits [B, S, vocabulary]; the caches are brought up to date."""
        ...


class OrtStream:
    """A batch of sequences fed to an :class:`~l4convert.runtime.session.OrtSession`.

    Not made by hand: ``session.start`` and ``session.restore`` make one, :meth:`fork` another.
    """

    def __init__(self, graph: Graph, cache: KvCacheState, occupancy: Occupancy, history: TokenHistory) -> None:
        self._graph = graph
        self._cache = cache
        self._occupancy = occupancy
        self._history = history
        self._config = graph.info.config

    @property
    def lengths(self) -> IntArray:
        """Tokens that each row has, int64 [B]; padding does not count."""
        return self._occupancy.lengths.copy()

    def cache_bytes(self) -> dict[str, int]:
        """Bytes that the caches hold now: of global layers (``global``) and of chunked ones (``chunked``)."""
        return self._cache.nbytes()

    def step_limit(self, context: int) -> int:
        """The most tokens to append at once; see :func:`l4convert.runtime.prefill.step_limit`.

        GroupQueryAttention works in blocks where it is given a past, no mask and one row: on static caches that it can
        read (docs/guides/long-context.md).
        """
        info, rows = self._graph.info, len(self._occupancy.lengths)
        kernel = info.target == "cpu" and (info.kv_scheme is None or info.kv_scheme.dtype != "fp8")
        blocks = kernel and info.kv_cache == "static" and rows == 1
        return step_limit(self._config, context, rows, scores=not blocks)

    def step(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append tokens; see :meth:`l4convert.runtime.runner.Stream.step`.

        Raises:
            InputError: A token outside the vocabulary, or ONNX Runtime failed.
            UsageError: The stream would become longer than the session's ``max_length``.
        """
        new = check_step(input_ids, mask, len(self._occupancy.lengths))
        self._check_room(input_ids, new)
        input_ids = np.ascontiguousarray(input_ids, np.int64)
        lengths = self._occupancy.lengths
        logits = self._feed(input_ids, new)
        self._history.append(lengths, input_ids, new)
        return logits

    def rollback(self, tokens: int | IntArray) -> None:
        """Forget the last tokens of each row, as if they had never been fed.

        Nothing is computed, but for a row that goes back into a chunk whose slots a chunked layer gave up when the
        row's next chunk began (windowed and static caches): it is fed that chunk's tokens again, up to C - 1.

        Args:
            tokens: How many: one number for all rows, or one for each, [B].

        Raises:
            ValueError: A row has fewer tokens, or a number is negative.
            UsageError: Such tokens are not known, because the stream was restored from caches.
        """
        chunk = self._config.attention_chunk_size
        way = plan_return(tokens, self._occupancy, self._history, chunk, self._cache.chunked_slots)
        if trailing := self._occupancy.cut(way.lengths):
            self._cache.drop_last(trailing)
        limit = step_limit(self._config, int(way.lengths.max()) + way.ids.shape[1], len(way.ids))
        begin = 0
        for width in prefill_steps(0, way.ids.shape[1], chunk, limit):
            self._feed(way.ids[:, begin : begin + width], way.mask[:, begin : begin + width])
            begin += width

    def fork(self, copies: int | None = None) -> OrtStream:
        """A stream of its own with the same content, of which each goes on independently.

        Growing and windowed caches are never written to, so both streams hold the same ones; static ones are copied.

        Args:
            copies: So many rows, which all begin with what this stream's only row has. Default: the same rows.

        Raises:
            ValueError: ``copies`` of a stream with several rows, or less than one copy.
        """
        batch = len(self._occupancy.lengths)
        if copies is not None and (batch != 1 or copies < 1):
            raise ValueError(f"{copies} copies of a stream of {batch} rows; only a single row can be copied")
        rows = np.zeros(copies, np.int64) if copies else np.arange(batch)
        cache = self._cache.fork(copies)
        return OrtStream(self._graph, cache, self._occupancy.take(rows), self._history.take(rows))

    def _feed(self, input_ids: IntArray, new: IntArray) -> FloatArray:
        """Run the graph, in as many calls as it needs: logits [B, S, vocabulary]."""
        if self._graph.info.calls == "any":
            logits = self._graph.run(self._cache, input_ids, self._occupancy.mask(new))
            self._occupancy.append(new)
            return logits
        result: FloatArray = np.zeros((*input_ids.shape, self._config.vocab_size), np.float32)
        chunk, room = self._config.attention_chunk_size, self._graph.max_length
        for call in calls_in_room(self._occupancy, new, chunk, room):
            call.put(self._graph.run(self._cache, call.take(input_ids), call.attention_mask()), result)
        return result

    def _check_room(self, input_ids: IntArray, new: IntArray) -> None:
        check_vocabulary(input_ids, self._config.vocab_size)
        longest = int((self._occupancy.lengths + new.sum(axis=1)).max())
        if longest > self._graph.max_length:
            raise UsageError(
                f"the text needs {longest} positions and the session has {self._graph.max_length}",
                f"Open it with a larger maximum length; the model has {self._config.max_position_embeddings}.",
            )
