"""Bytes of caches, predicted and held, and whether they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from l4convert.bench import ours, peer
from l4convert.bench.caches import CacheSizes, random_cache, require_room
from l4convert.bench.sweep import Sweep, sweep
from l4convert.errors import UsageError
from l4convert.progress import NO_PROGRESS
from l4convert.runtime import OrtSession, OrtStream, read_artifact
from l4convert.runtime.runner import IntArray
from tests.artifacts import KV_CACHES

CONTEXTS = (9, 16, 21)
SLOT = 2 * 4 * 2 * 16  # key and value, float32, heads, width
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8)


def values_of(stream: OrtStream) -> list[Any]:
    """The ``OrtValue`` of each cache, in the order of the graph's inputs: key and value of each layer."""
    cache: Any = stream._cache
    return list(cache._buffers if hasattr(cache, "_buffers") else cache._past)


@pytest.mark.parametrize("form", KV_CACHES)
@pytest.mark.parametrize("synthetic", [False, True])
def test_reported_bytes_are_those_of_the_values(form: str, synthetic: bool, artifacts: dict[str, Path]) -> None:
    """The caches of the last step of each length, and what the graph's inputs say of them."""
    info = read_artifact(artifacts[form])
    seen: dict[int, dict[str, int]] = {}

    class Spy(ours.StreamSubject):
        def feed(self, ids: IntArray) -> None:
            assert isinstance(self.stream, OrtStream)
            sizes = dict.fromkeys(("global", "chunked"), 0)
            for index, value in enumerate(values_of(self.stream)):
                sizes["chunked" if info.config.layers[index // 2].chunked else "global"] += value.numpy().nbytes
            seen[int(self.stream.lengths[0])] = sizes
            super().feed(ids)

    class Source(ours.RunnerSource):
        def fresh(self) -> Spy:
            return Spy(super().fresh().stream)

        def filled(self, length: int) -> Spy:
            return Spy(super().filled(length).stream)

    sizes = CacheSizes.of(info)
    with OrtSession.open(artifacts[form], max_length=CONTEXTS[-1], threads=1) as session, NO_PROGRESS.task("") as task:
        points = sweep(Source(session), Sweep(info.config, CONTEXTS, 2, synthetic), sizes.used, task)
    assert [point.cache_bytes for point in points] == [seen[context - 1] for context in CONTEXTS]
    assert all(sum(found.values()) > 0 for found in seen.values() if form == "static")
    if form == "static":
        assert [point.cache_bytes for point in points] == [sizes.used(CONTEXTS[-1])] * len(CONTEXTS)
    else:
        assert [point.cache_bytes for point in points] == [point.cache_used_bytes for point in points]
    slots = {"growing": 20, "windowed": 4, "static": 8}[form]
    assert points[-1].cache_used_bytes == {"global": 20 * SLOT, "chunked": 3 * slots * SLOT}


def test_bytes_during_a_call() -> None:
    slot = {"global": 10, "chunked": 30}
    assert CacheSizes("static", 8, slot).at_once(20) == 200 + 240
    assert CacheSizes("windowed", 8, slot).at_once(20) == 2 * (200 + 240)
    assert CacheSizes("growing", 8, slot).at_once(20) == 2 * (200 + 600)


def test_transformers_caches_are_counted_by_kind(scout_layout: Path) -> None:
    from l4convert.checkpoint import open_checkpoint
    from l4convert.parity.reference import load_transformers

    checkpoint = open_checkpoint(scout_layout)
    source = peer.TransformersSource(load_transformers(checkpoint, attention=None), checkpoint.config)
    for subject in (source.fresh(), source.filled(17)):
        if not subject.cache.get_seq_length():
            for size in (8, 8, 1):
                subject.feed(np.full((1, size), 5))
        assert subject.cache.get_seq_length() == 17
        assert subject.cache_bytes() == {"global": 17 * SLOT, "chunked": 3 * 7 * SLOT}
        subject.feed(np.full((1, 1), 5))
        assert subject.cache_bytes()["global"] == 18 * SLOT
    # Float32, and the layer that is copied to be made longer.
    assert peer.cache_bytes(checkpoint.config, 20, 4) == SLOT * (3 * 8 + 20) + SLOT * 20


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8, np.uint8]
)
def test_random_caches_of_every_type(dtype: Any) -> None:
    cache = random_cache("past_key_values.0.key", (1, 2, 60_000, 16), np.dtype(dtype))
    assert (cache.shape, cache.dtype) == ((1, 2, 60_000, 16), np.dtype(dtype))
    numbers = cache.astype(np.float32)
    assert np.isfinite(numbers).all()
    assert numbers.std() == pytest.approx(74 if np.dtype(dtype).kind in "iu" else 1, rel=0.05)
    assert numbers[0, 1, -1].std() > 0  # to its end


def test_what_does_not_fit_is_refused() -> None:
    require_room("it", 1000, available=1000)
    with pytest.raises(UsageError, match=r"it takes 2\.0 GB of memory, and 1\.0 GB are free"):
        require_room("it", 2_000_000_000, available=1_000_000_000)


@pytest.mark.parametrize(("dtype", "layers"), [("int4", "all"), ("int8", "global"), ("fp8", "all")])
def test_bytes_of_quantized_caches(dtype: Any, layers: str, scout_layout: Path, tmp_path: Path) -> None:
    """A global layer's element takes a byte or half of one; so do those of chunked layers, where all are quantized."""
    from dataclasses import asdict

    from l4convert.checkpoint import open_checkpoint
    from l4convert.emit import write_artifact
    from tests.caches import quantized

    checkpoint = open_checkpoint(scout_layout)
    model = quantized(checkpoint, dtype, "static", layers=layers)
    fields = {"kv_cache": "static", "target": "portable", "recipe": "none", "config": asdict(checkpoint.config)}
    out = write_artifact(model, tmp_path / "out", sidecars=(), manifest=fields)
    sizes = CacheSizes.of(read_artifact(out))
    bits = {"int4": 4, "int8": 8, "fp8": 8}[dtype]
    chunked_bits = 32 if layers == "global" else bits
    assert sizes.slot_bytes == {"global": SLOT * bits // 32, "chunked": 3 * SLOT * chunked_bits // 32}
    with OrtSession.open(out, max_length=20, threads=1) as session:
        subject = ours.RunnerSource(session).filled(19)
        subject.feed(np.full((1, 1), 5))
        assert subject.cache_bytes() == sizes.used(20)
