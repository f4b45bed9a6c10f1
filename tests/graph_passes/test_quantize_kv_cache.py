"""Quantized caches: what the pass rewrites, and that the graph computes what transformers does with such a cache."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest
import torch

from l4convert.checkpoint import open_checkpoint
from l4convert.emit.plan import plan_weights
from l4convert.frontend.compute import compute_type
from l4convert.graph_passes.quantize_kv_cache import kv_scale_names, set_kv_scales
from l4convert.quantization.kv import KV_FORMATS
from tests.caches import OUTLINED, CacheClient, quantized, recipe, scales
from tests.checkpoints import write_random_checkpoint
from tests.graphs import KEEP, SPLITS, canonical, relative_error, run_passes, snapshot, token_ids

DTYPES = ("fp8", "int8", "int4")
FORMS = ("growing", "windowed", "static")


@pytest.fixture(scope="module")
def one_chunk(tmp_path_factory):
    """All tokens in one chunk: there transformers rotates by the same angles, so its keys can be compared."""
    return open_checkpoint(write_random_checkpoint(tmp_path_factory.mktemp("wide"), attention_chunk_size=32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_cache", FORMS)
def test_inputs_and_outputs_hold_stored_elements(scout, dtype, kv_cache):
    model = canonical(scout, kv_cache)
    _, report = run_passes(model, *OUTLINED, recipe=recipe(dtype))
    assert (report.fired, report.skipped) == (4, ())
    elements, width = KV_FORMATS[dtype], scout.config.head_dim // KV_FORMATS[dtype].packing
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if v.name.startswith(("past", "present"))]
    assert len(caches) == 16
    for value in caches:
        assert value.dtype == elements.storage
        assert value.shape[3] in (width, "past_head_dim")
    calls = [node for node in model.graph if node.op_type == "LongContextAttention"]
    assert {node.attributes["kv_dtype"].as_string() for node in calls} == {dtype}
    assert all(node.overload.endswith(dtype) and node.op_identifier() in model.functions for node in calls)
    assert len(model.functions) == 2  # those of the float caches are gone


def test_the_recipe_may_keep_the_caches_of_chunked_layers(scout):
    model = canonical(scout, "static")
    _, report = run_passes(model, *OUTLINED, recipe=recipe("int8", "global"))
    assert (report.fired, len(report.skipped)) == (1, 3)
    assert {why for _, why in report.skipped} == {"the recipe keeps the caches of chunked layers"}
    types = {v.name: v.dtype for v in model.graph.inputs}
    assert types["past_key_values.2.key"] == ir.DataType.FLOAT
    assert types["past_key_values.3.value"] == ir.DataType.INT8
    assert kv_scale_names(model) == ["model.layers.3.self_attn.key_scale", "model.layers.3.self_attn.value_scale"]


def test_without_quantized_caches_in_the_recipe_nothing_changes(scout):
    model = canonical(scout)
    run_passes(model, "outline_attention")
    before = snapshot(model)
    (report,) = run_passes(model, "quantize_kv_cache", recipe=KEEP)
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_a_second_run_changes_nothing(scout):
    model = canonical(scout)
    run_passes(model, *OUTLINED, recipe=recipe("int4"))
    before = snapshot(model)
    (report,) = run_passes(model, "quantize_kv_cache", recipe=recipe("int4"))
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_heads_that_are_no_whole_bytes_are_left_with_the_reason(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, head_dim=6))
    # RoPE needs even heads, so there is no real model of this kind: the attribute says another width.
    model = canonical(checkpoint)
    run_passes(model, "outline_attention")
    for node in model.graph:
        if node.op_type == "LongContextAttention":
            node.attributes["head_dim"] = ir.AttrInt64("head_dim", 7)
    (report,) = run_passes(model, "quantize_kv_cache", recipe=recipe("int4"))
    assert report.fired == 0
    assert {why for _, why in report.skipped} == {"heads of 7 are not whole bytes of 2 codes"}


def test_a_cache_that_is_computed_is_left_with_the_reason(scout):
    model = canonical(scout, "static")
    run_passes(model, "outline_attention")
    call = next(node for node in model.graph if node.op_type == "LongContextAttention")
    negated = ir.node("Neg", [call.inputs[3]])
    model.graph.insert_before(call, negated)
    call.replace_input_with(3, negated.outputs[0])
    (report,) = run_passes(model, "quantize_kv_cache", recipe=recipe("int8"))
    assert report.fired == 3
    assert report.skipped == ((call.name, "its cache is not an input of the graph"),)


def test_the_compute_type_is_known_when_no_cache_tells_it(scout):
    model = canonical(scout, "static", "bfloat16")
    run_passes(model, *OUTLINED, recipe=recipe("fp8"))
    assert compute_type(model.graph) == compute_type(ir.from_proto(ir.to_proto(model)).graph) == "bfloat16"


def test_scales_are_set_by_name_and_stay_in_the_graph(tmp_path):
    """Whatever their size, and in a graph that was lowered: calibration sets them when the weights are written."""
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, head_dim=256, hidden_size=64))
    model = quantized(checkpoint, "int8", "static", "cpu")
    given = scales(model, "int8", reach=5.0)
    assert all(scale.nbytes >= 2048 for scale in given.values())
    set_kv_scales(model, given)
    planned = {value.name for tensor in plan_weights(model).tensors for value in tensor.values}
    assert len(planned) > 20
    assert not planned & given.keys()
    for name, scale in given.items():
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.2.self_attn.key_scale"), r"model.layers.2.self_attn.key_scale is missing"),
        (lambda s: s.update(other=np.ones(1, np.float32)), "other is unknown"),
        (lambda s: s.update({k: v[0] for k, v in s.items()}), r"is float32 \[2, 1, 16\], expected float32 \[1, 2, 1"),
        (lambda s: s.update({k: v.astype(np.float64) for k, v in s.items()}), "is float64"),
        (lambda s: s.update({k: 0 * v for k, v in s.items()}), "not a positive normal number"),
        (lambda s: s.update({k: v * np.nan for k, v in s.items()}), "not a positive normal number"),
        (lambda s: s.update({k: v * np.float32(1e-38) for k, v in s.items()}), "not a positive normal number"),
    ],
)
def test_scales_of_another_kind_are_refused_and_none_is_set(scout, change, message):
    model = canonical(scout)
    run_passes(model, *OUTLINED, recipe=recipe("int8"))
    given = scales(model, "int8")
    change(given)
    with pytest.raises(ValueError, match=message):
        set_kv_scales(model, given)
    assert all((model.graph.initializers[name].const_value.numpy() == 1).all() for name in kv_scale_names(model))


def rounding_cache(dtype, given, layers):
    """A cache of transformers that hands out what torch's own rounding makes of keys and values."""
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            if layer_idx in layers:
                prefix = f"model.layers.{layer_idx}.self_attn"
                key_states = rounded(key_states, torch.from_numpy(given[f"{prefix}.key_scale"]))
                value_states = rounded(value_states, torch.from_numpy(given[f"{prefix}.value_scale"]))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def rounded(x, scale):
        quotient, elements = x / scale, KV_FORMATS[dtype]
        if dtype == "fp8":
            return quotient.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        return torch.round(quotient).clamp(elements.lowest, elements.highest) * scale

    return Rounding()


@functools.cache
def transformers_model(path):
    from transformers import Llama4ForCausalLM

    return Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_logits(checkpoint, ids, cache):
    from transformers import DynamicCache

    with torch.no_grad():
        model = transformers_model(checkpoint.path)
        return model(
            torch.from_numpy(ids), past_key_values=DynamicCache() if cache is None else cache, use_cache=True
        ).logits.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", ["all", "global"])
def test_logits_are_those_of_transformers_with_a_rounded_cache(scout, one_chunk, dtype, layers):
    """Global layers do not rotate, so they can be compared over several chunks; chunked ones inside one."""
    checkpoint = one_chunk if layers == "all" else scout
    ids = token_ids(2)
    model = quantized(checkpoint, dtype, "static", layers=layers)
    numbers = range(4) if layers == "all" else [3]
    cache = rounding_cache(dtype, scales(model, dtype), numbers)
    expected = transformers_logits(checkpoint, ids, cache)
    effect = relative_error(transformers_logits(checkpoint, ids, None), expected)
    for splits in SPLITS:
        # A number on the edge of two codes may fall to the other side; what rounding does is far more.
        assert relative_error(CacheClient(model, checkpoint, "static").logits(ids, splits), expected) < 0.05 * effect


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_cache", FORMS)
def test_any_split_and_any_row_of_a_batch_gives_the_same_logits(scout, dtype, kv_cache):
    client = CacheClient(quantized(scout, dtype, kv_cache), scout, kv_cache)
    ids = token_ids(2)
    whole = client.logits(ids, SPLITS[0])
    assert relative_error(client.logits(ids, SPLITS[1]), whole) < 1e-3
    mask = np.ones_like(ids)
    mask[0, :5] = mask[1, -9:] = mask[1, 10:13] = 0
    padded = np.zeros_like(ids)
    for row in range(2):
        padded[row, mask[row] > 0] = ids[row, : mask[row].sum()]
    actual = client.logits(padded, (17, 12), mask)
    for row in range(2):
        real = actual[row, mask[row] > 0]
        assert relative_error(real, whole[row, : len(real)]) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_forms_of_the_cache_give_the_same_logits(scout, dtype):
    ids = token_ids(2)
    results = [CacheClient(quantized(scout, dtype, form), scout, form).logits(ids, SPLITS[1]) for form in FORMS]
    assert relative_error(results[1], results[0]) < 1e-3
    assert relative_error(results[2], results[0]) < 1e-3
