"""What streams that go back and fork are for: speculative decoding, shared prefixes; and caches from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.errors import UsageError
from l4convert.runtime import OrtSession, OrtStream
from l4convert.runtime.history import TokenHistory
from tests.artifacts import KV_CACHES
from tests.runtime.fake_device import CONTEXT, opened
from tests.runtime.following import Logits, begun, check, text

ROOM = 60


@pytest.fixture(scope="module")
def sessions(artifacts: dict[str, Path]) -> dict[str, OrtSession]:
    return {form: OrtSession.open(path, max_length=ROOM, threads=1) for form, path in artifacts.items()}


def greedy(session: OrtSession, prompts: np.ndarray, count: int) -> np.ndarray:
    """Plain decoding: [B, count]."""
    stream = session.start(len(prompts))
    logits = stream.step(prompts)[:, -1]
    made = []
    for _ in range(count):
        made.append(logits.argmax(axis=-1))
        logits = stream.step(made[-1][:, None])[:, -1]
    return np.stack(made, axis=1)


def speculative(stream: Any, prompts: np.ndarray, count: int, draft: np.ndarray) -> tuple[list[list[int]], int]:
    """Four drafted tokens a round, verified in one step; what was drafted wrongly is forgotten.

    Args:
        draft: [B, tokens] that the drafter would write; wrong in places.
        count: Tokens to make of each row.

    Returns:
        The rows, and the number of rounds.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    following = stream.step(prompts)[:, -1].argmax(axis=-1)
    rounds = 0
    while min(map(len, rows)) < count:
        drafted = np.stack([draft[r, len(row) + 1 : len(row) + 4] for r, row in enumerate(rows)])
        fed = np.concatenate([following[:, None], drafted], axis=1)
        best = stream.step(fed).argmax(axis=-1)
        rejected, rounds = [], rounds + 1
        for r, row in enumerate(rows):
            accepted = 1  # the first token is the model's own
            while accepted < fed.shape[1] and best[r, accepted - 1] == fed[r, accepted]:
                accepted += 1
            row.extend(fed[r, :accepted].tolist())
            rejected.append(fed.shape[1] - accepted)
            following[r] = best[r, accepted - 1]
        stream.rollback(np.array(rejected))
    return [row[:count] for row in rows], rounds


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("form", [*KV_CACHES, "engine"])
def test_speculative_decoding_writes_what_plain_decoding_does(
    form: str, batch: int, sessions: dict[str, OrtSession], built: dict[str, Path]
) -> None:
    """Rows accept different numbers of drafted tokens, and chunks of 8 end in the middle of drafts."""
    rng, count = np.random.default_rng(batch), 20
    prompts = rng.integers(3, 128, (batch, 10))
    expected = greedy(sessions["growing"], prompts, count + 8)
    draft = np.where(rng.random(expected.shape) < 0.3, 3, expected)
    if form == "engine":
        with opened(built["whole"]) as session:
            assert session.max_length == CONTEXT
            rows, rounds = speculative(session.start(batch), prompts, count, draft)
    else:
        rows, rounds = speculative(sessions[form].start(batch), prompts, count, draft)
    assert rows == expected[:, :count].tolist()
    assert rounds < count  # or nothing was ever accepted


@pytest.mark.parametrize("form", KV_CACHES)
def test_rows_that_share_a_prefix(form: str, sessions: dict[str, OrtSession], reference: Logits) -> None:
    """The prefix is read once, by one row; three continue it, and the first goes on as if there were no others."""
    prefix = begun(sessions[form], 1)
    prefix.step(text(13)[None])
    rows = prefix.fork(copies=3)
    rows.step(np.stack([text(9, seed) for seed in range(3)]))
    prefix.step(text(5, seed=7)[None])
    rows.rollback([2, 9, 10])  # the last of them into the prefix
    rows.step(np.stack([text(4, seed) for seed in range(3, 6)]))
    check([prefix, rows], reference)


@pytest.mark.parametrize("form", ["growing", "windowed"])
def test_forks_share_memory_where_caches_are_not_written_to(form: str, sessions: dict[str, OrtSession]) -> None:
    stream = sessions[form].start(1)
    stream.step(text(13)[None])
    mine, others = (
        {value.data_ptr() for value in s._cache._past if value.shape()[2]}  # type: ignore[attr-defined]
        for s in (stream, stream.fork())
    )
    assert mine == others


def test_only_a_single_row_is_copied(sessions: dict[str, OrtSession]) -> None:
    with pytest.raises(ValueError, match="copies of a stream of 2 rows"):
        sessions["growing"].start(2).fork(copies=2)
    with pytest.raises(ValueError, match="0 copies"):
        sessions["growing"].start(1).fork(copies=0)


def test_cache_bytes_of_chunked_layers_stay_those_of_a_chunk(sessions: dict[str, OrtSession]) -> None:
    """Layers 0 to 2 are chunked, layer 3 is global; a slot is 2 heads of 16 float32 numbers, keys and values."""
    slot = 2 * 16 * 4 * 2
    streams = {form: session.start(1) for form, session in sessions.items()}
    for length in range(1, 30):
        for stream in streams.values():
            stream.step(np.array([[5]]))
        assert streams["growing"].cache_bytes() == {"global": length * slot, "chunked": 3 * length * slot}
        assert streams["windowed"].cache_bytes() == {"global": length * slot, "chunked": 3 * (length % 8) * slot}
        assert streams["static"].cache_bytes() == {"global": ROOM * slot, "chunked": 3 * 8 * slot}
    streams["growing"].rollback(9)
    assert streams["growing"].cache_bytes() == {"global": 20 * slot, "chunked": 3 * 20 * slot}


@pytest.mark.parametrize("form", KV_CACHES)
def test_a_restored_stream_goes_on_where_the_other_ended(
    form: str, sessions: dict[str, OrtSession], reference: Logits
) -> None:
    """Two rows of different lengths, in different chunks; their caches are taken from a stream that has them."""
    session, texts = sessions[form], [text(19), text(12, seed=2)]
    singles = [session.start(1) for _ in texts]
    for stream, row in zip(singles, texts, strict=True):
        stream.step(row[None])
    names = singles[0]._cache._names.past  # type: ignore[attr-defined]
    asked = []

    def caches(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        asked.append((name, shape, dtype))
        result = np.zeros(shape, dtype)
        for row, stream in enumerate(singles):
            state: Any = stream._cache
            held = (state._buffers if form == "static" else state._past)[names.index(name)].numpy()[0]
            slots = held.shape[1]
            if form == "static":
                result[row] = held
            elif slots:
                result[row, :, shape[2] - slots :] = held
        return result

    stream = session.restore(np.array([19, 12]), caches)
    assert [name for name, _, _ in asked] == list(names)
    widths = {"growing": [19] * 8, "windowed": [4] * 6 + [19] * 2, "static": [8] * 6 + [ROOM] * 2}[form]
    assert [shape[2] for _, shape, _ in asked] == widths
    assert stream.lengths.tolist() == [19, 12]
    following = np.stack([text(9, seed=4), text(9, seed=5)])
    logits = stream.step(following)
    for row, (begin, more) in enumerate(zip(texts, following, strict=True)):
        expected = reference([[*begin.tolist(), *more.tolist()]])[0][-9:]
        assert np.abs(logits[row] - expected).max() <= 1e-4 * np.abs(expected).max()
    stream.rollback(np.array([4, 4]))  # to 24 and to 17: nothing that was given up
    stream.step(np.full((2, 1), 5))
    if form == "growing":
        stream.rollback(np.array([24, 10]))
        assert stream.lengths.tolist() == [1, 8]
        return
    with pytest.raises(UsageError, match="rollback to before token 18"):
        # Row 0 is in the chunk after: the tokens before 19 of its chunk are gone, and were never told.
        stream.rollback(np.array([7, 0]))


def zeros(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_what_cannot_be_restored_is_refused(sessions: dict[str, OrtSession]) -> None:
    session = sessions["static"]
    with pytest.raises(UsageError, match="61 tokens, and the session has room for 60"):
        session.restore(np.array([61]), zeros)
    for lengths in (np.array([-1]), np.zeros((1, 1), np.int64), np.zeros(0, np.int64)):
        with pytest.raises(ValueError, match="lengths"):
            session.restore(lengths, zeros)
    for wrong in (lambda n, s, d: np.zeros(s, np.float64), lambda n, s, d: np.zeros(s[:-1], d)):
        with pytest.raises(ValueError, match=r"cache past_key_values\.0\.key is .*, expected contiguous float32"):
            session.restore(np.array([3]), wrong)


def test_restored_arrays_are_the_caches(sessions: dict[str, OrtSession]) -> None:
    """10 GB that were made in place must not be copied."""
    made = {}

    def keep(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        made[name] = np.zeros(shape, dtype)
        return made[name]

    stream = sessions["static"].restore(np.array([5]), keep)
    stream.step(np.array([[7]]))
    for name, array in made.items():
        written = np.flatnonzero(np.abs(array).sum(axis=(0, 1, 3)))
        assert written.tolist() == [5], name


@pytest.mark.parametrize("amount", [-1, 5, [1, 5], [0, -1]])
def test_rollbacks_that_make_no_sense_are_programming_errors(
    amount: int | list[int], sessions: dict[str, OrtSession]
) -> None:
    stream: OrtStream = sessions["growing"].start(2)
    stream.step(np.full((2, 4), 5))
    with pytest.raises(ValueError, match="rollback of"):
        stream.rollback(amount if isinstance(amount, int) else np.array(amount))
    assert stream.lengths.tolist() == [4, 4]


def test_a_history_that_begins_late_keeps_what_comes_before_it_when_told() -> None:
    history = TokenHistory(np.array([100, 103]))
    history.append(np.array([100, 103]), np.array([[1, 2], [3, 4]]), np.array([[1, 1], [0, 1]]))
    assert history.known(np.array([100, 102])).tolist() == [True, False]
    history.append(np.array([96, 103]), np.arange(10, 30).reshape(2, 10), np.ones((2, 10), np.int64))
    assert history.known(np.array([96, 103])).tolist() == [True, True]
    ids, mask = history.between(np.array([97, 111]), np.array([99, 112]))
    assert ids.tolist() == [[11, 12], [28, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
