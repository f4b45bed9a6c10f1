"""The attention kernels and their launch code, on the stand-in GPU, give what the function's body gives."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from l4convert.plugins.library import native
from tests.plugins.attention_cases import (
    CHUNKED,
    GLOBAL,
    Call,
    Result,
    Run,
    attributes_of,
    cache_errors,
    expected,
    make_call,
    positions_of,
    relative_error,
)

# BF16 keeps 8 bits: the acceptance bound of the issue. FP16 keeps 11.
BOUND = {"bfloat16": 1e-2, "float16": 2e-3}
C = CHUNKED.chunk_size
KV_DTYPES = ("none", "fp8", "int8")
LAYERS = pytest.mark.parametrize("layer", [CHUNKED, GLOBAL], ids=["chunked", "global"])


def check(gpu, call: Call) -> Result:
    """Run a call and compare all that it gives with the reference."""
    run = Run(gpu, call)
    got, want = run.result(), expected(call)
    real = call.new_positions >= 0
    if real.any():
        assert relative_error(got.attention[real], want.attention[real]) <= BOUND[call.spec.compute]
    assert not got.attention[~real].any()  # padding
    key, value = cache_errors(call, got, want)
    assert value == 0
    assert key <= (BOUND[call.spec.compute] if call.spec.rope or call.spec.qk_norm_eps else 0)
    return got


def capacity(spec, positions) -> int:
    """Slots enough for the positions, and a few more where a layer may have more."""
    return spec.chunk_size or positions.shape[1] + 3


# A batch of sequences whose lengths lie at the edges of chunks and of tiles, one of them without a new token.
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@LAYERS
def test_one_token(gpu, layer, kv_dtype):
    past = [0, 1, C - 2, C - 1, C, C + 1, 5 * C + 7, 3 * C]
    positions = positions_of(past, [1] * 7 + [0], 1)
    check(gpu, make_call(replace(layer, kv_dtype=kv_dtype), positions, 1, capacity(layer, positions)))


@pytest.mark.parametrize("kv_dtype", ["none", "fp8"])
def test_any_number_of_parts_gives_one_answer(make_gpu, kv_dtype):
    positions = positions_of([330, 40, 150], [1, 1, 1], 1)
    call = make_call(replace(GLOBAL, kv_dtype=kv_dtype), positions, 1, 340)
    results, parts = [], []
    for multiprocessors in (1, 8, 24):
        gpu = make_gpu(multiprocessors=multiprocessors)
        results.append(check(gpu, call))
        parts.append(gpu.launches[0].grid[0])
    assert len(set(parts)) == 3
    for other in results[1:]:
        assert relative_error(other.attention, results[0].attention) <= 2**-7  # a bit of bfloat16, summed otherwise


# Left: padding before the new tokens. The third sequence's tokens are fewer, the fourth has none.
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("new_tokens", [2, 17])
@LAYERS
def test_some_tokens(gpu, layer, new_tokens, left):
    new = [new_tokens, new_tokens, new_tokens - 1, 0]
    positions = positions_of([C - 1, C + 1, 2 * C - 1, 5], new, new_tokens, left)
    check(gpu, make_call(layer, positions, new_tokens, capacity(layer, positions)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("past", [0, C - 3])
@LAYERS
def test_a_chunk_of_tokens(gpu, layer, past, kv_dtype):
    """C tokens, from the start of a chunk and over a boundary."""
    positions = positions_of([past], [C], C)
    check(gpu, make_call(replace(layer, kv_dtype=kv_dtype), positions, C, capacity(layer, positions)))


def test_several_chunks_at_once(gpu):
    """Of two sequences that are in different places of their chunks; only the last chunk's tokens are kept."""
    positions = positions_of([7, 3 * C], [2 * C + 6, C + 1], 2 * C + 6)
    check(gpu, make_call(CHUNKED, positions, 2 * C + 6, C))


@pytest.mark.parametrize("kv_dtype", ["none", "int8"])
@LAYERS
def test_a_short_call_after_a_long_past_is_cut_into_parts(make_gpu, layer, kv_dtype):
    spec = replace(layer, kv_dtype=kv_dtype, chunk_size=layer.chunk_size and 2048, floor_scale=700.0)
    positions = positions_of([1500, 1023], [3, 2], 3)
    gpu = make_gpu(multiprocessors=16)
    check(gpu, make_call(spec, positions, 3, 2048))
    names = [launch.kernel.name.split("_")[1] for launch in gpu.launches]
    assert names == ["prepare", "prefill", "combine", "commit"]


@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(40, 8, 16), (4, 4, 16), (16, 1, 16), (5, 1, 32), (5, 1, 64), (5, 1, 128)]
)
def test_heads(gpu, heads, kv_heads, head_dim, new_tokens):
    spec = replace(CHUNKED, num_heads=heads, kv_num_heads=kv_heads, head_dim=head_dim)
    check(gpu, make_call(spec, positions_of([C - 1], [new_tokens], new_tokens), new_tokens, C))


@pytest.mark.parametrize("new_tokens", [1, 2])
@pytest.mark.parametrize("attn_scale", [0.0, 0.1])
@pytest.mark.parametrize("qk_norm_eps", [0.0, 0.1])
@pytest.mark.parametrize("rope", [False, True])
def test_every_way_to_prepare_heads(gpu, rope, qk_norm_eps, attn_scale, new_tokens):
    # An epsilon of a tenth of the numbers' mean square, so that it matters.
    spec = replace(CHUNKED, rope=rope, qk_norm_eps=qk_norm_eps, attn_scale=attn_scale, floor_scale=3.0)
    check(gpu, make_call(spec, positions_of([C + 5], [new_tokens], new_tokens), new_tokens, C))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_float16(gpu, new_tokens, kv_dtype):
    positions = positions_of([20, 90], [new_tokens] * 2, new_tokens)
    call = make_call(replace(GLOBAL, compute="float16", kv_dtype=kv_dtype), positions, new_tokens, 100)
    check(gpu, call)


# 80: bytes are taken apart, there is no instruction. Small scales: most numbers are beyond the largest code.
@pytest.mark.parametrize("new_tokens", [1, 3])
@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize(("kv_dtype", "sm"), [("fp8", 80), ("fp8", 90), ("int8", 90)])
def test_scales_of_channels(make_gpu, kv_dtype, sm, spread, new_tokens):
    spec = replace(CHUNKED, kv_dtype=kv_dtype, num_heads=10, kv_num_heads=2)
    positions = positions_of([C - 2, 70], [new_tokens] * 2, new_tokens)
    check(make_gpu(sm=sm), make_call(spec, positions, new_tokens, C, granularity="channel", spread=spread))


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_every_number_is_rounded_as_the_body_rounds_it(gpu, kv_dtype):
    """All finite bfloat16 numbers, by a scale that keeps ties, and one where x / scale and x * (1 / scale) differ."""
    patterns = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    numbers = patterns[np.isfinite(patterns.astype(np.float32))].reshape(1, -1, 128)
    count = numbers.shape[1]
    spec = replace(GLOBAL, kv_dtype=kv_dtype, num_heads=1, kv_num_heads=1, head_dim=128)
    call = make_call(spec, positions_of([0], [count], count), count, count)
    scales = [np.full((1, 1, 1, 128), scale, np.float32) for scale in (1.0, 0.18906249105930328)]
    call = replace(call, key=numbers, value=numbers, key_scale=scales[0], value_scale=scales[1])
    got, want = Run(gpu, call).result(), expected(call)
    np.testing.assert_array_equal(got.present_key, want.present_key)
    np.testing.assert_array_equal(got.present_value, want.present_value)


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_a_diagonal_anywhere_in_a_tile(gpu, padding):
    """Queries' tiles begin at other tokens than keys' tiles end, by one more for each token of padding in front."""
    call = make_call(GLOBAL, positions_of([0], [72 - padding], 72, left=True), 72, 75)
    check(gpu, call)


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
@pytest.mark.parametrize("last", [10_485_759, 10_485_761, 2**33 + 3])
def test_positions_ten_million_tokens_away(gpu, last, new_tokens):
    """A chunked layer needs a few slots for them; the temperature of its queries is that of their positions."""
    spec = replace(CHUNKED, attn_scale=0.1, floor_scale=8192.0)
    past = last + 1 - new_tokens
    positions = np.arange(past - C, last + 1)[None]
    check(gpu, make_call(spec, positions, new_tokens, C))


def test_weights_that_float16_would_lose(gpu):
    """A thousand tokens of which each weighs 1e-8 as much as one other: together they are the whole result."""
    spec = replace(GLOBAL, kv_dtype="fp8", attn_scale=0.0)
    call = make_call(spec, positions_of([1000], [1], 1), 1, 1001)
    scale = np.full((1, 1, 1, 16), 2**-8, np.float32)
    query, keys, values = np.zeros((1, 1, 80)), np.zeros_like(call.past_key), np.ones_like(call.past_value)
    query[..., ::16] = 400.0
    keys[0, 0, 3, 0] = 4 * np.log(1e8) / 400 * 2**8
    values[0, 0, 3] = 0
    nothing = np.zeros_like(call.key)
    call = replace(call, past_key=keys, past_value=values, key=nothing, value=nothing)
    call = replace(call, query=query.astype(call.query.dtype), key_scale=scale, value_scale=scale)
    assert 1e-9 < np.abs(check(gpu, call).attention).max() < 1e-7


def test_caches_that_are_not_written_in_place_are_copied_first(gpu):
    call = make_call(GLOBAL, positions_of([9], [2], 2), 2, 20)
    run = Run(gpu, call, in_place=False)
    np.testing.assert_array_equal(run.buffers["past_key"].numpy(), call.past_key)
    want, got = expected(call), run.result()
    assert relative_error(got.attention, want.attention) <= BOUND["bfloat16"]
    np.testing.assert_array_equal(got.present_key, want.present_key)
    np.testing.assert_array_equal(got.present_value, want.present_value)


def test_without_new_tokens_the_caches_are_copied_all_the_same(gpu):
    past = np.arange(2 * 8 * 16).reshape(2, 1, 8, 16).astype(ml_dtypes.bfloat16)
    given = {name: gpu.upload(past if name == "past_key" else -past) for name in ("past_key", "past_value")}
    present = {f"present_{part}": gpu.empty(past.shape, past.dtype) for part in ("key", "value")}
    gpu.attention(attributes_of(GLOBAL), native.AttentionShape(2, 0, 5, 8, 0), **given, **present)
    np.testing.assert_array_equal(present["present_key"].numpy(), past)
    np.testing.assert_array_equal(present["present_value"].numpy(), -past)
    assert not gpu.launches


def test_a_batch_gives_each_sequence_what_it_gives_alone(gpu):
    positions = positions_of([3, 40, 71], [5, 2, 5], 5)
    call = make_call(CHUNKED, positions, 5, C)
    together = Run(gpu, call).result()
    for row in range(3):
        parts = {
            name: getattr(call, name)[row : row + 1]
            for name in ("query", "key", "value", "past_key", "past_value", "positions")
        }
        alone = Run(gpu, replace(call, **parts)).result()
        np.testing.assert_array_equal(alone.attention[0], together.attention[row])
        np.testing.assert_array_equal(alone.present_key[0], together.present_key[row])


@st.composite
def calls(draw):
    """Any layer, any lengths, any padding."""
    spec = draw(st.sampled_from([CHUNKED, GLOBAL]))
    if spec.chunk_size:
        spec = replace(spec, chunk_size=draw(st.sampled_from([8, 16, 48])))
    spec = replace(spec, kv_dtype=draw(st.sampled_from(KV_DTYPES)))
    batch, new_tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    past = draw(st.lists(st.integers(1, 100), min_size=batch, max_size=batch))
    new = draw(st.lists(st.integers(0, new_tokens), min_size=batch, max_size=batch))
    positions = positions_of(past, new, new_tokens, draw(st.booleans()))
    return make_call(spec, positions, new_tokens, capacity(spec, positions), draw(st.integers(0, 99)))


@given(call=calls(), multiprocessors=st.sampled_from([1, 6]))
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
def test_any_call(stand_ins, call, multiprocessors):
    check(stand_ins[multiprocessors], call)


@pytest.fixture(scope="module")
def stand_ins(interpreted_library, driver):
    from tests.plugins.stand_in import StandIn

    return {count: StandIn(interpreted_library, driver, multiprocessors=count) for count in (1, 6)}
