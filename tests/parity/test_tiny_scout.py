"""The trained model's figures: they are what the README promises, so they must not get worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l4convert.parity import Comparison, Metrics, TransformersReference, validate
from l4convert.parity.metrics import NO_TARGET
from l4convert.parity.validate import prepare_text
from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession, read_artifact

# Recipe, block size -> the most mean KL on `portable`; `cpu` may have a fifth more.
LIMITS = (("int4", 32, 0.0048), ("int4", 128, 0.0066), ("fp8", None, 0.003), ("fp8-experts", None, 0.003))


@pytest.fixture(scope="module")
def text(tiny_scout: Path) -> str:
    return (tiny_scout / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reference_logits(tiny_scout: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, np.ndarray]:
    """Window -> logits: the first 3,000 tokens in windows of 1,000, each from position 0."""
    artifact = make(tiny_scout, tmp_path_factory.mktemp("any"), "portable", "int4")
    windows, _ = prepare_text(read_artifact(artifact), text, tokens=3000, window=1000)
    with TransformersReference(tiny_scout) as reference:
        return {window.tobytes(): reference.logits(window) for window in windows}


def make(
    checkpoint: Path, folder: Path, target: str, recipe: str, block: int | None = None, kv: str = "growing"
) -> Path:
    out = folder / "artifact"
    convert(ConvertOptions(checkpoint, out, target=target, recipe=recipe, block_size=block, kv_cache=kv))
    return out


def measure(artifact: Path, expected: dict[bytes, np.ndarray]) -> Metrics:
    comparison = Comparison()
    with OrtSession.open(artifact, max_length=1000) as session:
        for key, logits in expected.items():
            ids = np.frombuffer(key, np.int64)
            comparison.update(logits, session.start(1).step(ids[None])[0], np.append(ids[1:], NO_TARGET))
    return comparison.result()


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize(("recipe", "block", "limit"), LIMITS)
def test_quantized_artifacts_lose_no_more_than_promised(
    recipe: str,
    block: int | None,
    limit: float,
    target: str,
    tiny_scout: Path,
    reference_logits: dict[bytes, np.ndarray],
    tmp_path: Path,
) -> None:
    metrics = measure(make(tiny_scout, tmp_path, target, recipe, block), reference_logits)
    assert not metrics.problems()
    assert metrics.tokens == 3000
    assert metrics.ppl_reference == pytest.approx(13.06, abs=0.005)  # as measured by whoever trained it
    assert metrics.mean_kl <= limit * (1.2 if target == "cpu" else 1.0)


@pytest.mark.parametrize(("target", "kv_cache"), [("portable", "growing"), ("cpu", "static"), ("cpu", "windowed")])
def test_unquantized_artifacts_equal_the_reference_in_every_split(
    target: str, kv_cache: str, tiny_scout: Path, text: str, tmp_path: Path
) -> None:
    artifact = make(tiny_scout, tmp_path, target, "none", kv=kv_cache)
    report = validate(artifact, tiny_scout, text=text, tokens=1000)
    assert report.passed, report.failures
    assert len(report.rows) == 6
    assert all(row.metrics.max_rel_logit <= 1e-4 for row in report.rows)
