"""Planned bytes against real ones: files as they lie on the disk, and caches as ONNX Runtime holds them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from l4convert.cli._inspect_artifact import quantized_share
from l4convert.engine.network import graph_facts
from l4convert.pipeline import ConvertOptions, PlanOptions, convert, plan_conversion
from l4convert.planning.caches import Caches
from l4convert.quantization.kv import kv_scheme
from l4convert.runtime.session import OrtSession

# nano: chunks of 64. Inside of the first chunk, at its end, and in the fourth.
LENGTHS = (40, 64, 200)
BATCH = 2
_SCALE = re.compile(r"self_attn\.(key|value)_scale")


def converted(nano: Path, out: Path, **options: Any) -> Path:
    """The artifact, after its files were compared with their plan: exact, where 1 % was asked for."""
    plan = plan_conversion(PlanOptions(nano, **options))
    calibration = {}
    if "kv_dtype" in options:
        calibration = {"calibration": nano.parent / "heldout.txt", "calibration_tokens": 128}
    convert(ConvertOptions(nano, out, **options, **calibration))
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.name != "l4convert.json"}
    assert sizes == dict(plan.files)
    assert (
        plan.files["model.safetensors"] >= plan.bytes == sum(row.bytes for row in plan.table if row.offset is not None)
    )
    return out


def check_caches(artifact: Path, compute: Any, planned: Caches) -> None:
    with OrtSession.open(artifact, max_length=max(LENGTHS)) as session:
        stream = session.start(BATCH)
        done = 0
        for length in LENGTHS:
            stream.step(np.full((BATCH, length - done), 7))
            held = planned.held_bytes(BATCH, max(LENGTHS) if planned.form == "static" else length)
            assert stream.cache_bytes() == held, length
            most = planned.bytes(BATCH, max(LENGTHS))
            assert all(held[kind] <= most[kind] for kind in held)
            done = length
    assert planned.dtype == compute


@pytest.mark.parametrize("form", ["growing", "static", "windowed"])
@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_float32_on_the_cpu(nano: Path, tmp_path: Path, recipe: str, form: str):
    artifact = converted(nano, tmp_path / "out", recipe=recipe, kv_cache=form)
    check_caches(artifact, "float32", Caches.of(_config(nano), form, "float32", None))


@pytest.mark.parametrize(
    ("dtype", "form", "layers"),
    [
        ("fp8", "static", "all"),
        ("int8", "windowed", "global"),
        ("int4", "growing", "all"),
        ("int4", "static", "global"),
    ],
)
def test_quantized_caches(nano: Path, tmp_path: Path, dtype: str, form: str, layers: str):
    artifact = converted(nano, tmp_path / "out", recipe="none", kv_cache=form, kv_dtype=dtype, kv_layers=layers)
    planned = Caches.of(_config(nano), form, "float32", kv_scheme(dtype, None, layers))
    check_caches(artifact, dtype, planned)
    scales = [tensor for tensor in onnx.load(artifact / "model.onnx").graph.initializer if _SCALE.search(tensor.name)]
    assert planned.scale_bytes == sum(4 * math.prod(tensor.dims) for tensor in scales) > 0


def test_bfloat16_of_the_target_for_cuda(nano: Path, tmp_path: Path):
    artifact = converted(nano, tmp_path / "out", recipe="none", target="cuda", kv_cache="static")
    check_caches(artifact, "bfloat16", Caches.of(_config(nano), "static", "bfloat16", None))


@pytest.mark.parametrize(("recipe", "dtype", "bits"), [("int4", "INT32", 4), ("fp8", "INT64", 8)])
def test_packed_experts_of_the_target_for_plugins(nano: Path, tmp_path: Path, recipe: str, dtype: str, bits: int):
    artifact = converted(nano, tmp_path / "out", recipe=recipe, target="tensorrt")
    words = {t.name: t for t in onnx.load(artifact / "model.onnx", load_external_data=False).graph.initializer}
    packed = [tensor for name, tensor in words.items() if name.endswith("_packed")]
    config = _config(nano)
    experts = config.num_local_experts * 3 * config.hidden_size * config.intermediate_size
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in packed} == {dtype}
    assert sum(math.prod(tensor.dims) for tensor in packed) * 8 == experts * len(config.layers)
    graph = onnx.load(artifact / "model.onnx", load_external_data=False)
    facts = graph_facts(graph)
    # `inspect` counts what is not quantized (embedding, head, norms, routers, tables) and the codes in words alike.
    plain = sum(math.prod(t.dims) for t in words.values() if not re.search(r"_(int4|fp8)|_scale", t.name))
    assert quantized_share(graph) == pytest.approx(facts.quantized_weights / (facts.quantized_weights + plain))
    assert facts.quantized_weights > experts * len(config.layers)  # and the matrices beside the experts
    assert experts * len(config.layers) * bits // 8 <= facts.packed_bytes < facts.weights_bytes


def test_what_is_shown_for_a_context_is_what_is_held(nano: Path, tmp_path: Path):
    plan = plan_conversion(PlanOptions(nano, recipe="none", kv_cache="static", context="200", batch=BATCH))
    artifact = converted(nano, tmp_path / "out", recipe="none", kv_cache="static")
    assert plan.serving is not None
    with OrtSession.open(artifact, max_length=200) as session:
        assert plan.serving.chosen.cache_bytes == sum(session.start(BATCH).cache_bytes().values())


def _config(checkpoint: Path) -> Any:
    from l4convert.checkpoint import open_checkpoint

    return open_checkpoint(checkpoint).config
