"""Bytes of caches in closed form."""

from __future__ import annotations

import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.planning.caches import Caches, cache_choices
from l4convert.quantization.kv import kv_scheme


@pytest.mark.parametrize(("dtype", "each"), [(None, 49152), ("fp8", 24576), ("int8", 24576), ("int4", 12288)])
def test_bytes_of_a_token(dtype: str | None, each: int):
    scheme = None if dtype is None else kv_scheme(dtype)
    caches = Caches.of(SCOUT, "static", "bfloat16", scheme)
    assert caches.bytes_per_token == each == 12 * 2 * 8 * 128 * 2 * each // 49152
    small, large = (caches.bytes(3, tokens) for tokens in (8192, 10**6))
    assert small["chunked"] == large["chunked"] == 3 * 3 * 8192 * each
    assert large["global"] - small["global"] == 3 * (10**6 - 8192) * each
    assert caches.scale_bytes == (0 if dtype is None else 48 * 2 * 8 * 128 * 4)


def test_growing_caches_hold_everything_on_every_layer_and_twice_in_a_call():
    growing, static = (Caches.of(SCOUT, form, "float32", None) for form in ("growing", "static"))
    assert growing.bytes_per_token == 4 * static.bytes_per_token
    assert (growing.copies, static.copies) == (2, 1)
    figures = growing.figures(1, 10**5)
    assert sum(figure.value for figure in figures) == 2 * sum(growing.bytes(1, 10**5).values())


def test_quantizing_global_layers_only_leaves_the_others():
    caches = Caches.of(SCOUT, "static", "bfloat16", kv_scheme("int4", "channel", "global"))
    plain = Caches.of(SCOUT, "static", "bfloat16", None)
    assert caches.bytes(1, 10**6)["chunked"] == plain.bytes(1, 10**6)["chunked"]
    assert 4 * caches.bytes(1, 10**6)["global"] == plain.bytes(1, 10**6)["global"]
    assert caches.scaled_layers == 12
    chosen = cache_choices(SCOUT, "static", "bfloat16", kv_scheme("int4", "channel", "global"))
    assert [c.scaled_layers for c in chosen] == [0, 48, 48, 12]
