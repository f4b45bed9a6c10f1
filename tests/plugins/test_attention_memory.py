"""What the attention kernels read and write: each visible key and value once, nothing else, however far away."""

from __future__ import annotations

import mmap
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tests.plugins.attention_cases import (
    CHUNKED,
    GLOBAL,
    Run,
    expected,
    make_call,
    positions_of,
    relative_error,
)
from tests.plugins.interpreter import GUARD, DeviceBuffer

C = CHUNKED.chunk_size
SLOTS = 10_485_760  # of Scout's global layers


# 5 query heads share a key/value head; a program that took them one by one would load everything 5 times.
@pytest.mark.parametrize("kv_dtype", ["none", "fp8"])
@pytest.mark.parametrize("spec", [CHUNKED, GLOBAL], ids=["chunked", "global"])
def test_one_token_loads_what_it_sees_once(make_gpu, spec, kv_dtype):
    spec = replace(spec, kv_dtype=kv_dtype, num_heads=10, kv_num_heads=2)
    past = [0, C - 1, C, 4 * C + 11]
    call = make_call(spec, positions_of(past, [1, 1, 1, 1], 1), 1, spec.chunk_size or 5 * C)
    run = Run(make_gpu(multiprocessors=16), call, count=True)
    width = 16 * call.past_key.itemsize
    for name in ("past_key", "past_value"):
        loads = run.buffers[name].loads.reshape(4, 2, -1, width)
        for row, length in enumerate(past):
            seen = length % C if spec.chunk_size else length
            assert (loads[row, :, :seen] == 1).all()
            assert not loads[row, :, seen:].any()
        assert run.gpu.stored[run.buffers[name]] == 4 * 2 * width


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_a_sequence_without_new_tokens_is_not_touched(gpu, new_tokens):
    call = make_call(GLOBAL, positions_of([7, 30], [0, 0], new_tokens), new_tokens, 40)
    run = Run(gpu, call)
    for name in ("past_key", "past_value"):
        assert not run.gpu.loaded[run.buffers[name]]
        assert not run.gpu.stored[run.buffers[name]]
    assert not run.result().attention.any()


def test_prefill_skips_what_no_query_of_a_tile_sees(gpu):
    """Of the new keys and values, tile by tile of queries: from the chunk of its first token up to its last."""
    tokens, past, group = 3 * C, 5, 5
    call = make_call(CHUNKED, positions_of([past], [tokens], tokens), tokens, C)
    run = Run(gpu, call)
    (prefill,) = [launch for launch in gpu.launches if launch.kernel.symbol == "prefill"]
    rows = int(prefill.kernel.constants["BM"])
    new = old = 0
    for first_row in range(0, tokens * group, rows):
        first, last = first_row // group, min((first_row + rows - 1) // group, tokens - 1)
        chunk = (past + first) // C * C - past
        new += last + 1 - max(chunk, 0)
        old += past if chunk < 0 else 0
    size = 2 * 16 * 2  # of a token: key and value
    (workspace,) = [buffer for buffer in prefill.loaded if buffer.name == "workspace"]
    facts = 3 * 8 * prefill.grid[0]  # where the sequence's tokens are
    assert prefill.loaded[workspace] - facts == new * size
    in_cache = [prefill.loaded[run.buffers[name]] for name in ("past_key", "past_value")]
    assert in_cache == [old * 16 * 2] * 2
    assert old < past * prefill.grid[0]  # tiles after the first chunk read none of it


def test_a_new_chunk_reads_nothing_of_the_cache(gpu):
    run = Run(gpu, make_call(CHUNKED, positions_of([2 * C], [C], C), C, C))
    assert not gpu.loaded[run.buffers["past_key"]]
    assert gpu.stored[run.buffers["past_key"]] == C * 16 * 2


class SparseBuffer(DeviceBuffer):
    """Memory that exists where it is written."""

    def __post_init__(self) -> None:
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.12 has the name; Linux the number
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        self._raw = np.frombuffer(mmap.mmap(-1, self.nbytes + 2 * GUARD, flags=flags), np.uint8)
        self._raw[:GUARD] = self._raw[-GUARD:] = 0xFF
        self.bytes = self._raw[GUARD:-GUARD]
        self.address = self._raw.ctypes.data + GUARD
        self._outside = (self._raw[:GUARD], self._raw[-GUARD:])
        self.loads = np.zeros(0, np.uint16)


# Slots of the last sequence start 2.7e9 elements into the cache, which 32 bits cannot count.
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_caches_of_more_elements_than_32_bits_count(gpu, new_tokens):
    spec = replace(GLOBAL, head_dim=128)
    positions = positions_of([70, 5, 66], [new_tokens] * 3, new_tokens)
    small = make_call(spec, positions, new_tokens, 80)
    shape = (3, 1, SLOTS, 128)
    large = {}
    for name in ("past_key", "past_value"):
        buffer = gpu.memory.add(SparseBuffer(int(np.prod(shape)) * 2, name, dtype=small.past_key.dtype, shape=shape))
        buffer.bytes.view(ml_dtypes.bfloat16).reshape(shape)[:, :, :80] = getattr(small, name)
        large[name] = buffer
    run = Run(gpu, small, given=large, capacity=SLOTS)
    want = expected(small)
    assert relative_error(run.attention.numpy().astype(np.float32), want.attention) <= 1e-2
    for name, reference in (("past_key", want.present_key), ("past_value", want.present_value)):
        after = large[name].bytes.view(ml_dtypes.bfloat16).reshape(shape)[:, :, :80]
        np.testing.assert_array_equal(after.astype(np.float32), reference)


def test_slots_of_more_elements_than_32_bits_count(gpu):
    """Later than any token of a model: the offset of one slot is beyond 32 bits."""
    first, tokens, capacity = 2**24 + 5, 3, 2**24 + 64
    rng = np.random.default_rng(0)
    new = [gpu.upload(rng.integers(1, 2**15, (1, 1, tokens, 128), np.int16)) for _ in range(2)]
    caches = [gpu.memory.add(SparseBuffer(capacity * 256, f"cache {i}")) for i in range(2)]
    sequences = gpu.upload(np.array([[0, tokens, first, 0]]))
    pointers = [("p", buffer) for buffer in (*new, sequences, *caches)]
    numbers = [("i", tokens), ("l", capacity), ("l", 2**31 - 1)]
    gpu.launch("attention_commit_16_d128", (1, 1, 1), [*pointers, *numbers])
    for cache, source in zip(caches, new, strict=True):
        written = cache.bytes.view(np.int16).reshape(capacity, 128)
        np.testing.assert_array_equal(written[first : first + tokens], source.numpy()[0, 0])
        assert not written[first - 9 : first].any()
        assert not written[first + tokens :].any()
        assert not written[:64].any()
