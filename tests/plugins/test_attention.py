"""The attention kernels and their launch code, on the stand-in GPU, give what the function's body gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.plugins.attention_cases import (
    CHUNKED,
    GLOBAL,
    Call,
    Result,
    cache_errors,
    expected,
    make_call,
    positions_of,
    relative_error,
    run,
)

# BF16 keeps 8 bits: the acceptance bound of the issue. FP16 keeps 11.
BOUND = {"bfloat16": 1e-2, "float16": 2e-3}
C = CHUNKED.chunk_size


def check(gpu, call: Call) -> Result:
    """Run a call and compare everything with the reference."""
    want, got = expected(call), run(gpu, call)
    real = call.new_positions >= 0
    assert relative_error(got.attention[real], want.attention[real]) <= BOUND[call.spec.compute]
    assert not got.attention[~real].any()  # padding
    key, value = cache_errors(call, got, want)
    assert value == 0
    assert key <= (BOUND[call.spec.compute] if call.spec.rope or call.spec.qk_norm_eps else 0)
    return got


# One new token at the edges of chunks and of tiles, and sequences of very different lengths in one batch.
@pytest.mark.parametrize("kv_dtype", ["none", "fp8", "int8"])
@pytest.mark.parametrize("spec", [CHUNKED, GLOBAL], ids=["chunked", "global"])
def test_one_token(gpu, spec, kv_dtype):
    past = [0, 1, C - 2, C - 1, C, C + 1, 5 * C + 7, 3 * C]
    spec = replace(spec, kv_dtype=kv_dtype)
    positions = positions_of(past, [1] * 7 + [0], 1)
    check(gpu, make_call(spec, positions, 1, capacity=C if spec.chunk_size else 6 * C + 3))
