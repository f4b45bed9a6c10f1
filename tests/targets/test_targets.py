"""What each target promises about the graphs that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.graph_passes import CANONICAL_PASSES, LOWERING_PASSES, PASSES
from l4convert.quantization.recipe import bundled_recipes, load_recipe
from l4convert.targets import TARGETS
from tests.caches import quantized
from tests.graphs import lowered

KERNELS = {"GroupQueryAttention", "QMoE", "MoE", "MatMulNBits"}


def test_passes_are_known_once_and_in_order():
    names = [row.name for row in PASSES]
    assert len(set(names)) == len(names)
    canonical = ["outline_attention", "fuse_experts", "quantize_weights", "quantize_kv_cache"]
    assert names[: len(CANONICAL_PASSES)] == canonical
    order = [row.name for row in LOWERING_PASSES]
    for target in TARGETS.values():
        lowering = [row.name for row in target.lowering]
        assert lowering == sorted(lowering, key=order.index)
    assert [row.name for row in PASSES if not row.exact] == [*canonical[2:], "store_compute_type"]


def test_targets_say_which_quantized_caches_they_take():
    every = ("fp8", "int8", "int4")
    taken = {name: target.kv_dtypes for name, target in TARGETS.items()}
    plugins = ("fp8", "int8")
    assert taken == {"cpu": every, "cuda": every, "portable": every, "tensorrt": plugins, "tensorrt-rtx": ()}


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_portable_graphs_with_quantized_caches_are_standard_onnx(scout_layout: Path, tmp_path: Path, dtype: Any):
    model = quantized(open_checkpoint(scout_layout), dtype, "windowed")
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_rows_are_named_by_their_keys():
    assert {name: target.name for name, target in TARGETS.items()} == {name: name for name in TARGETS}
    assert {name: (t.kv_caches[0], t.compute[0], t.calls) for name, t in TARGETS.items()} == {
        "cpu": ("growing", "float32", "any"),
        "cuda": ("static", "bfloat16", "any"),
        "portable": ("growing", "float32", "any"),
        "tensorrt": ("static", "bfloat16", "in_place"),
        "tensorrt-rtx": ("static", "bfloat16", "in_place"),
    }


@pytest.mark.parametrize("kv_cache", ["growing", "static", "windowed"])
@pytest.mark.parametrize("name", bundled_recipes())
def test_portable_is_standard_onnx(scout_layout: Path, tmp_path: Path, name: str, kv_cache: str):
    model = lowered(open_checkpoint(scout_layout), "portable", kv_cache, load_recipe(name))
    assert not model.functions
    assert dict(model.graph.opset_imports) == {"": 23}
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", bundled_recipes())
def test_cpu_uses_its_kernels_and_no_function(maverick_layout: Path, name: str):
    model = lowered(open_checkpoint(maverick_layout), "cpu", recipe=load_recipe(name))
    assert not model.functions
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert {node.domain for node in nodes} == {"", "com.microsoft"}
    kernels = {node.op_type for node in nodes if node.domain}
    assert kernels <= KERNELS
    expected = {"none": {"MoE"}, "keep": {"MoE"}, "int4": {"QMoE", "MatMulNBits"}, "fp8": set(), "fp8-experts": set()}
    assert kernels == {"GroupQueryAttention"} | expected[name]
