"""Portable artifacts on a runtime that is not ONNX Runtime: the reference evaluator of the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from l4convert.pipeline import ConvertOptions, convert
from l4convert.runtime import OrtSession
from tests.graphs import relative_error


@pytest.mark.parametrize(("recipe", "kv_cache"), [("none", "static"), ("int4", "growing"), ("fp8", "windowed")])
def test_onnx_reference_evaluator_gives_the_same_logits(
    tmp_path: Path, scout_layout: Path, recipe: str, kv_cache: str
) -> None:
    out = tmp_path / "artifact"
    convert(ConvertOptions(scout_layout, out, target="portable", recipe=recipe, kv_cache=kv_cache))
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = onnx.load(out / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert not model.functions
    ids = np.random.default_rng(0).integers(3, 128, (1, 13))  # crosses the chunk boundary at 8
    with OrtSession.open(out, max_length=16) as session:
        expected = session.start(1).step(ids)
        layers = session.config.layers
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for number, layer in enumerate(layers):
        slots = {"static": 8 if layer.chunked else 16}.get(kv_cache, 0)
        empty = np.zeros((1, 2, slots, 16), np.float32)
        feeds |= {f"past_key_values.{number}.{part}": empty for part in ("key", "value")}
    actual = ReferenceEvaluator(model).run(["logits"], feeds)[0]
    assert relative_error(actual, expected) <= 1e-5
