"""How calls are planned and what is refused, for sizes that nobody runs in an interpreter: nothing is launched here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.errors import DeviceError
from l4convert.plugins.library import native
from l4convert.plugins.long_context_attention.variants import variants
from tests.plugins import interpreter

SCOUT = {"num_heads": 40, "kv_num_heads": 8, "head_dim": 128, "chunk_size": 8192, "rope": 1, "qk_norm_eps": 1e-5}
FAR = {"num_heads": 40, "kv_num_heads": 8, "head_dim": 128, "floor_scale": 8192.0, "attn_scale": 0.1}
MULTIPROCESSORS = 132  # of an H100
INPUTS = ("query", "key", "value", "past_key", "past_value", "positions", "cos", "sin", "key_scale", "value_scale")
WORKSPACE = 1 << 40


def shape(batch: int, new_tokens: int, seen: int, chunk: int = 0) -> native.AttentionShape:
    """A call with just as many slots and rows as it needs."""
    slots = min(chunk, seen) if chunk else seen
    return native.AttentionShape(batch, new_tokens, seen, slots, slots)


@pytest.fixture
def planner(make_gpu, monkeypatch):
    """An H100 that runs nothing: its ``launches`` are the plan."""
    monkeypatch.setattr(interpreter, "run", lambda *_args, **_options: None)
    return make_gpu(sm=90, multiprocessors=MULTIPROCESSORS)


def plan(gpu, attributes: dict, call: native.AttentionShape, **replaced: int | None) -> list:
    """The launches of a call whose buffers are nowhere."""
    gpu.launches.clear()
    addresses: dict = {name: (i + 1) << 45 for i, name in enumerate(INPUTS)}
    addresses |= {"attention": 11 << 45, "present_key": 4 << 45, "present_value": 5 << 45, "workspace": WORKSPACE}
    buffers = native.AttentionBuffers(**(addresses | replaced))
    gpu.call(lambda: gpu.library.attention_enqueue(native.Attention(**attributes), call, buffers))
    return list(gpu.launches)


@pytest.mark.parametrize(("batch", "seen"), [(1, 8192), (1, 131_072), (8, 8192), (8, 131_072), (64, 8192)])
def test_decode_fills_the_machine(planner, batch, seen):
    decode, combine = plan(planner, FAR, shape(batch, 1, seen))
    parts, heads, rows = decode.grid
    assert (heads, rows) == (8, batch)
    blocks = 2 * MULTIPROCESSORS
    programs = parts * 8 * batch
    rounds = -(-programs // blocks)
    assert programs / (rounds * blocks) >= 0.9
    assert combine.grid == (40 * batch, 1, 1)


def test_parts_follow_the_context(planner):
    """From one token to ten million; a chunked layer sees 8192 at most."""
    contexts = [1, 100, 8192, 131_072, 1_048_576, 10_485_760]
    parts = [plan(planner, FAR, shape(1, 1, seen))[0].grid[0] for seen in contexts]
    assert parts[0] == 1
    assert all(fewer <= more for fewer, more in pairwise(parts))
    assert parts[-1] == 1024  # what combine reads is one part in 2,000 of what decode reads
    chunked = [plan(planner, SCOUT, shape(1, 1, seen, 8192))[0].grid[0] for seen in contexts[2:]]
    assert set(chunked) == {parts[2]}


def test_a_long_context_is_cut_whatever_the_batch(planner):
    """One long sequence of many must not keep a few multiprocessors busy alone."""
    (decode, _) = plan(planner, FAR, shape(64, 1, 1_048_576))
    assert 1_048_576 / decode.grid[0] <= 8192


@pytest.mark.parametrize(
    ("batch", "new_tokens", "seen", "parts"),
    [(1, 8192, 8192, 1), (1, 17, 1_048_576, 16), (1, 2, 600, 2), (8, 512, 8192, 1)],
)
def test_prefill_is_cut_only_where_it_has_too_few_tiles(planner, batch, new_tokens, seen, parts):
    launches = plan(planner, FAR, shape(batch, new_tokens, seen))
    names = [launch.kernel.symbol for launch in launches]
    assert names == ["prepare", "prefill", *(["combine"] if parts > 1 else []), "commit"]
    tiles = -(-new_tokens * 5 // 128)
    assert launches[1].grid == (tiles * parts, 8, batch)
    assert launches[1].arguments["splits"] == parts


# What plans can be made of; T >= S as always.
SIZES = st.tuples(st.integers(1, 70), st.sampled_from([1, 2, 17, 300]), st.integers(300, 200_000), st.integers(1, 160))


@given(sizes=SIZES, chunk=st.sampled_from([0, 4096]), kv_dtype=st.sampled_from([0, 1]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_call_stays_within_its_workspace(interpreted_library, driver, sizes, chunk, kv_dtype):
    from tests.plugins.stand_in import StandIn

    batch, new_tokens, seen, multiprocessors = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "run", lambda *_args, **_options: None)
        gpu = StandIn(interpreted_library, driver, multiprocessors=multiprocessors)
        attributes = {**FAR, "chunk_size": chunk, "kv_dtype": kv_dtype}
        call = shape(batch, new_tokens, seen, chunk)
        launches = plan(gpu, attributes, call)
    end = WORKSPACE + gpu.library.attention_workspace(native.Attention(**attributes), call, multiprocessors)
    first = next(launch for launch in launches if launch.kernel.symbol in ("decode", "prefill"))
    parts = int(first.arguments.get("splits", first.grid[0]))
    if first.kernel.symbol == "decode" or parts > 1:
        rows = batch * new_tokens * 40 * parts
        pieces = {"partial": rows * 128 * 4, "partial_max": rows * 4, "partial_sum": rows * 4}
        addresses = sorted((int(first.arguments[name]), size) for name, size in pieces.items())
        assert all(address + size <= after for (address, size), (after, _) in pairwise(addresses))
        assert addresses[-1][0] + addresses[-1][1] <= end
    if first.kernel.symbol == "prefill":
        tokens = batch * 8 * new_tokens * 128 * (1 if kv_dtype else 2)
        assert int(first.arguments["sequences"]) + batch * 32 <= int(first.arguments["new_key"])
        assert int(first.arguments["new_key"]) + tokens <= int(first.arguments["new_value"])
        assert int(first.arguments["new_value"]) + tokens <= min(end, int(first.arguments["partial"]))
    assert all(
        int(first.arguments[name]) % 256 == 0 for name in first.arguments if name.startswith(("partial", "new_k"))
    )


@given(sizes=SIZES, more=SIZES, chunk=st.sampled_from([0, 4096]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_smaller_call_never_needs_a_larger_workspace(interpreted_library, sizes, more, chunk):
    """TensorRT asks once, for the largest shapes."""
    attention = native.Attention(**FAR, chunk_size=chunk)
    needed = []
    for batch, new_tokens, seen, multiprocessors in (sizes, tuple(map(max, sizes, more))):
        call = shape(batch, new_tokens, seen, chunk)
        needed.append(interpreted_library.attention_workspace(attention, call, multiprocessors))
    assert needed[0] <= needed[1]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_heads": 12}, "num_heads must be a multiple of kv_num_heads"),
        ({"kv_num_heads": 0}, "num_heads must be a multiple of kv_num_heads"),
        ({"head_dim": 96}, "head_dim must be a power of two from 16 on"),
        ({"chunk_size": -1}, "chunk_size is negative"),
        ({"qk_norm_eps": -1.0}, "qk_norm_eps is negative"),
        ({"qk_norm_eps": float("nan")}, "qk_norm_eps is negative"),
        ({"attn_scale": -0.1}, "attn_scale is negative"),
        ({"attn_scale": 0.1, "floor_scale": 0.0}, "floor_scale must be above 0"),
        ({"compute": 2}, "it computes in bfloat16 or float16 only"),
        ({"kv_dtype": 3}, "kv_dtype must be none, fp8 or int8"),
    ],
)
def test_attributes_that_are_refused(interpreted_library, attributes, message):
    with pytest.raises(DeviceError, match=f"^LongContextAttention: {message}$"):
        interpreted_library.attention_check(native.Attention(**(SCOUT | attributes)))
    interpreted_library.attention_check(native.Attention(**SCOUT))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((1, 2, 1, 8192, 8192), "positions have fewer columns than there are new tokens"),
        ((65_536, 1, 1, 8192, 8192), "more than 65535 sequences"),
        ((1, 1, 9000, 8191, 8192), "the cache has 8191 slots, fewer than the 8192 that 9000 tokens may need"),
        ((1, 1, 9000, 8192, 8191), "the rotary tables have 8191 rows, fewer than the 8192 positions"),
        ((1, 1, 2**31, 8192, 8192), "more than 2147483646 tokens, slots or rows"),
        ((-1, 1, 1, 8192, 8192), "a negative size"),
    ],
)
def test_shapes_that_are_refused(planner, call, message):
    with pytest.raises(DeviceError, match=f"^LongContextAttention: {message}$"):
        plan(planner, SCOUT, native.AttentionShape(*call))
    with pytest.raises(DeviceError, match=message):
        planner.library.attention_workspace(native.Attention(**SCOUT), native.AttentionShape(*call), 132)
    assert not planner.launches


@pytest.mark.parametrize("name", [*INPUTS, "attention", "workspace"])
def test_buffers_that_are_refused(planner, name):
    attributes = {**SCOUT, "kv_dtype": native.KV_DTYPES["fp8"]}
    with pytest.raises(DeviceError, match=f"^LongContextAttention: {name} is null$"):
        plan(planner, attributes, shape(1, 1, 100, 8192), **{name: None})
    with pytest.raises(DeviceError, match=f"^LongContextAttention: {name} is not aligned to 16 bytes$"):
        plan(planner, attributes, shape(1, 1, 100, 8192), **{name: (1 << 40) + 8})
    assert not planner.launches


def test_tables_and_scales_are_needed_only_where_they_are_used(planner):
    absent = dict.fromkeys(("cos", "sin", "key_scale", "value_scale"))
    assert plan(planner, FAR, native.AttentionShape(1, 1, 100, 100, 0), **absent)


def test_a_head_dim_without_kernels_is_refused_with_the_command(planner):
    with pytest.raises(DeviceError, match=r"l4convert plugins build --head-dim 256 --sm 90 --compute bf16$"):
        plan(planner, {**FAR, "head_dim": 256}, shape(1, 1, 100))


def test_too_many_query_heads_to_a_key_value_head_are_refused(planner):
    with pytest.raises(DeviceError, match=r"17 query heads to a key/value head are too many$"):
        plan(planner, {**FAR, "num_heads": 17, "kv_num_heads": 1}, shape(1, 1, 100))


@pytest.mark.parametrize("empty", [(0, 1, 5), (1, 0, 5)])
def test_an_empty_call_launches_nothing(planner, empty):
    assert plan(planner, FAR, shape(*empty)) == []


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
def test_scaling_a_masked_score_leaves_nothing_to_round(head_dim):
    """The compiler fuses the product with a difference, which the interpreter does not: 1e21 would be left over."""
    from l4convert.plugins.long_context_attention.prefill import LOWEST

    (variant,) = (one for one in variants((head_dim,)) if one.name == f"attention_prefill_bf16_none_d{head_dim}")
    scale = np.float32(variant.constants["SCALE"])
    assert float(np.float32(LOWEST.value) * scale) == float(LOWEST.value) * float(scale)
