"""Working memory against what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.planning.caches import Caches
from l4convert.planning.fit import Deployment
from l4convert.planning.shards import Weights
from l4convert.planning.speed import Layout
from l4convert.planning.working import Call, working_figures

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("tokens", "layers"), [(1, 1), (512, 1), (512, 2), (512, 4)])
def test_scratch_of_tensorrt_rtx(tokens: int, layers: int):
    """The builder's own figures: benchmarks/results and, for several layers, benchmarks/engine_forms.py."""
    path = REPO / "benchmarks" / "results" / "2026-11-22-engine-forms.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["attention"]
    folded = {(r["capacity"], r["tokens"]): r.get("scratch_bytes") for r in rows if "folded" in r["form"]}
    measured = {1: folded[131072, tokens], 2: 1895080960, 4: 3241580032}[layers]
    caches = dataclasses.replace(Caches.of(SCOUT, "static", "bfloat16", None), global_layers=layers)
    figures = working_figures("tensorrt-rtx", Call(SCOUT, 1, tokens, 131072, 1, 2, caches))
    planned = sum(figure.value for figure in figures if figure.name in ("copy of a large cache", "masks"))
    assert planned == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize(
    ("form", "tokens", "peak"),
    [("static", 8192, 121), ("static", 16384, 128), ("windowed", 8192, 161), ("windowed", 16384, 206),
     ("growing", 8192, 256), ("growing", 16384, 405)],
)  # fmt: skip
def test_memory_of_the_cpu(form: str, tokens: int, peak: int):
    """Peaks in MB of what tiny-scout took, in BF16 on the CPU, beyond the process before it was opened.

    Opened and fed with steps of 128 tokens by ``OrtSession`` (onnxruntime-gpu 1.31.1); VmHWM of /proc/self/status.
    """
    layers = SCOUT.layers[:8]
    config = dataclasses.replace(
        SCOUT, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        vocab_size=2048, attention_chunk_size=128, layers=layers,
    )  # fmt: skip
    weights = Weights({("other", "nothing"): 33_088_000}, 2, half=32_000_000)
    there = Deployment(config, "cpu", "float32", weights, 10**12, 1, (1,), 512, host=True)
    budget = there.budget(Caches.of(config, form, "float32", None), tokens, Layout(1))
    planned = sum(figure.value for figure in budget if figure.name != "runtime") / 1e6
    assert 0.9 * peak <= planned + 10 <= 1.3 * peak  # 10: graph and session, which the margin for the runtime covers
