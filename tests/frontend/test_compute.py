"""Graphs in bfloat16 and float16: as near to transformers' float32 as transformers is in that type itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, compute_type, from_float32, to_float32
from l4convert.graph_passes.editing import attention_calls, spec_of
from l4convert.plugins.moe.definition import MoESpec
from l4convert.quantization.recipe import load_recipe
from tests.checkpoints import MAVERICK, write_random_checkpoint
from tests.graphs import canonical, op_counts, reference_logits, run_passes, token_ids
from tests.in_place import InPlaceClient

CANONICAL = ("outline_attention", "fuse_experts", "quantize_weights")
NARROW = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("compute")
    options: dict[str, dict[str, Any]] = {
        "scout": {},
        "maverick": dict(MAVERICK),
        "unfused": {"unfused": True, "num_experts_per_tok": 2},
    }
    return {name: open_checkpoint(write_random_checkpoint(root / name, **kw)) for name, kw in options.items()}


@pytest.mark.parametrize("compute", ["float32", *NARROW])
@pytest.mark.parametrize("layout", ["scout", "maverick", "unfused"])
def test_passes_fire_as_often_as_in_float32(checkpoints, layout, compute):
    """And scales are of the type that the weights are computed with."""
    model = canonical(checkpoints[layout], "static", compute)
    reports = run_passes(model, *CANONICAL, recipe=load_recipe("int4"))
    moe = 2 if layout == "maverick" else 4
    # Seven products a layer and two stacks of experts.
    assert [r.fired for r in reports] == [4, moe, 4 * 7 + 2 * moe]
    assert reports[0].skipped == reports[1].skipped == ()
    kept = {name.split(".")[-2] for name, _ in reports[2].skipped}
    assert kept == {"router", "lm_head"}
    dtype = COMPUTE_TYPES[compute]
    scales = {value.dtype for name, value in model.graph.initializers.items() if name.endswith("_scale")}
    assert scales == {dtype}
    assert op_counts(model)["DequantizeLinear"] == reports[2].fired


@pytest.mark.parametrize("compute", ["float32", *NARROW])
def test_calls_say_the_compute_type(checkpoints, compute):
    model = canonical(checkpoints["scout"], "static", compute)
    run_passes(model, *CANONICAL)
    assert {spec.compute for _, spec, _ in attention_calls(model.graph)} == {compute}
    experts = [spec_of(MoESpec, node) for node in model.graph if node.op_type == "MoE"]
    assert experts == [MoESpec(4, 64, 64, 1, compute=compute)] * 4  # type: ignore[arg-type]
    suffix = "" if compute == "float32" else f"_{compute}"
    assert sorted(key[2] for key in model.functions) == sorted(
        [f"chunked8_rope_static{suffix}", f"e4_top1{suffix}", f"global_nope_static{suffix}"]
    )


@pytest.mark.parametrize("compute", ["float32", *NARROW])
def test_caches_have_the_compute_type_and_logits_are_float32(checkpoints, compute):
    model = canonical(checkpoints["scout"], "static", compute)
    dtype = COMPUTE_TYPES[compute]
    assert compute_type(model.graph) == compute
    assert {value.dtype for value in model.graph.inputs[2:]} == {dtype}
    assert {value.dtype for value in model.graph.outputs[1:]} == {dtype}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_graph_without_caches_computes_in_float32():
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64))
    assert compute_type(ir.Graph([ids], [], nodes=[])) == "float32"


def test_float32_needs_no_casts():
    value = ir.Value(name="x")
    b = Builder()
    assert to_float32(b, value, "float32") is value
    assert from_float32(b, value, "float32") is value
    assert b.nodes == []


def _transformers(checkpoint: Checkpoint, ids: np.ndarray, compute: str) -> np.ndarray:
    import torch
    from transformers import Llama4ForCausalLM

    dtype = getattr(torch, compute)
    model = Llama4ForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor(ids), use_cache=False).logits.float().numpy()
    return logits


@pytest.mark.parametrize("compute", NARROW)
@pytest.mark.parametrize("layout", ["scout", "maverick"])
def test_as_near_to_float32_as_transformers_in_that_type(checkpoints, layout, compute):
    """Mean distances, because a token that is sent to another expert is far off in either."""
    checkpoint, ids = checkpoints[layout], token_ids(2)
    exact = reference_logits(checkpoint.path, ids)
    theirs = np.abs(_transformers(checkpoint, ids, compute) - exact).mean()
    client = InPlaceClient(canonical(checkpoint, "static", compute), checkpoint.config, compute)
    for splits in ([29], [5, 7, 1, 13, 3]):
        ours = np.abs(client.logits(ids, splits) - exact).mean()
        assert 0 < ours <= 1.25 * theirs, splits


@pytest.mark.parametrize("compute", NARROW)
@pytest.mark.parametrize("kv_cache", ["growing", "windowed", "static"])
def test_every_form_of_the_cache_is_outlined(checkpoints, kv_cache, compute):
    model = canonical(checkpoints["scout"], kv_cache, compute)
    (report,) = run_passes(model, "outline_attention")
    assert (report.fired, report.skipped) == (4, ())
