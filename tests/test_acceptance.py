"""The numbers that the project promises, on the trained checkpoint beside the repository (24 times larger than nano).

As its README measures them: 3,000 tokens of held-out text in windows of 1,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession
from tests.test_end_to_end import run, run_json

TOKENS, WINDOW = 3000, 1000
SPLIT = 400  # tokens for comparing splits: three boundaries of chunks, and a quarter of the time of a window
# (recipe, block size) -> mean KL(reference || artifact) in nats a token on the portable target; a fifth more on others.
MEAN_KL = {("int4", 32): 0.0048, ("int4", 128): 0.0066, ("fp8", None): 0.003, ("fp8-experts", None): 0.003}
FIFTH_MORE = 1.2


@pytest.fixture(scope="module")
def windows(tiny_scout: Path) -> list[np.ndarray]:
    from transformers import AutoTokenizer

    text = (tiny_scout / "heldout.txt").read_text()
    ids = AutoTokenizer.from_pretrained(tiny_scout)(text, add_special_tokens=False).input_ids[:TOKENS]
    return list(np.array(ids, np.int64).reshape(-1, WINDOW))


@pytest.fixture(scope="module")
def reference(tiny_scout: Path, windows: list[np.ndarray]) -> list[np.ndarray]:
    """Log probabilities of transformers, float32, eager: [tokens, vocabulary] for each window."""
    import torch
    from transformers import Llama4ForCausalLM

    model: Any = Llama4ForCausalLM.from_pretrained(tiny_scout, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = [model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy() for ids in windows]
    return [log_softmax(x) for x in logits]


def test_the_reference_has_the_perplexity_that_its_training_measured(windows, reference) -> None:
    likelihoods = [x[np.arange(len(ids) - 1), ids[1:]] for x, ids in zip(reference, windows, strict=True)]
    assert np.exp(-np.concatenate(likelihoods).mean()) == pytest.approx(13.06, abs=0.005)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def artifact(tiny_scout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("acceptance")

    def make(recipe: str, target: str, block_size: int | None = None, kv_cache: str = "growing") -> Path:
        out = root / f"{recipe}-{target}-{block_size}-{kv_cache}"
        if not out.exists():
            how: dict[str, Any] = {"target": target, "recipe": recipe, "block_size": block_size, "kv_cache": kv_cache}
            convert(ConvertOptions(tiny_scout, out, **how))
        return out

    return make


FORMS = [("portable", "growing"), ("cpu", "growing"), ("cpu", "static"), ("cpu", "windowed")]


@pytest.mark.parametrize(("target", "kv_cache"), FORMS)
def test_unquantized_is_the_reference_in_every_split(artifact, tiny_scout: Path, target: str, kv_cache: str) -> None:
    options = ["--reference", tiny_scout, "--text", tiny_scout / "heldout.txt", "--tokens", SPLIT, "--window", SPLIT]
    report = run_json("validate", artifact("none", target, kv_cache=kv_cache), *options)
    assert report["passed"] is True
    assert report["text"]["tokens"] == SPLIT
    names = [row["name"] for row in report["rows"]]
    assert {"one call", "odd splits", "whole chunks", "token by token"} <= set(names)
    assert sum(name.startswith("batch") for name in names) == 2
    for row in report["rows"]:
        assert row["boundaries"] > 0
        assert row["reference"]["tokens"] > 0
        assert row["reference"]["max_rel_logit"] <= 1e-4, row["name"]


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize(("recipe", "block_size"), MEAN_KL)
def test_quantized_loses_little(artifact, windows, reference, recipe: str, block_size: int | None, target: str) -> None:
    kl = divergence(artifact(recipe, target, block_size), windows, reference)
    assert kl.shape == (TOKENS,)
    assert 1e-5 < kl.mean() <= MEAN_KL[recipe, block_size] * (1 if target == "portable" else FIFTH_MORE)


def divergence(artifact: Path, windows: list[np.ndarray], reference: list[np.ndarray]) -> np.ndarray:
    """KL(reference || artifact) of every token, in nats."""
    pieces = []
    with OrtSession.open(artifact) as session:
        for ids, expected in zip(windows, reference, strict=True):
            logits = session.start(1).step(ids[None])[0]
            pieces.append((np.exp(expected) * (expected - log_softmax(logits))).sum(axis=-1))
    return np.concatenate(pieces)


def test_the_command_measures_the_same(artifact, tiny_scout: Path, windows, reference) -> None:
    """On the first half of the first window, which causal models see alike."""
    out, half = artifact("int4", "cpu", 32), WINDOW // 2
    options = ["--text", tiny_scout / "heldout.txt", "--tokens", half, "--window", half]
    report = run_json("validate", out, "--reference", tiny_scout, *options)
    row = next(row for row in report["rows"] if row["name"] == "one call")
    assert row["reference"]["tokens"] == half
    expected = divergence(out, windows[:1], reference[:1])[:half].mean()
    assert row["reference"]["mean_kl"] == pytest.approx(expected, rel=1e-4)
    assert json.loads((out / "parity.json").read_text()) == report
    run("verify", out)
