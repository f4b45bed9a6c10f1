"""Weights are stored in the type that they are computed with, never in a wider one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.quantization.recipe import load_recipe
from tests.checkpoints import write_random_checkpoint
from tests.graphs import canonical, relative_error, run_passes, snapshot, token_ids
from tests.in_place import InPlaceClient

PASS = "store_compute_type"


@pytest.fixture(scope="module")
def float32(tmp_path_factory):
    path = tmp_path_factory.mktemp("float32")
    return open_checkpoint(write_random_checkpoint(path, dtype="float32"))


def stored(model):
    return {name: value.const_value for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_a_float32_checkpoint_is_stored_in_16_bits(float32, compute):
    model = canonical(float32, "static", compute)
    before, ids = stored(model), token_ids(1)
    expected = InPlaceClient(model, float32.config, compute).logits(ids, [9, 20])
    casts = sum(node.op_type == "Cast" for node in model.graph)
    (report,) = run_passes(model, PASS)
    # Seven products, two norms and two stacks of experts a layer, the last norm and the head. The embedding is cast
    # after it was gathered, and the router stays float32.
    assert (report.fired, report.skipped) == (4 * 11 + 2, ())
    assert sum(node.op_type == "Cast" for node in model.graph) == casts - report.fired
    after = stored(model)
    narrow = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[compute]
    wide = {"model.embed_tokens.weight"} | {name for name in before if "router" in name or "rotary" in name}
    assert after.keys() == before.keys()  # under the same names
    for name, tensor in after.items():
        content = before[name].numpy()
        assert np.array_equal(tensor.numpy(), content if name in wide else content.astype(narrow)), name
        assert tensor.name == name
    actual = InPlaceClient(model, float32.config, compute).logits(ids, [9, 20])
    # The casts round as the file does now; ONNX Runtime leaves some out where it computes float16 in float32.
    assert relative_error(actual, expected) <= (0 if compute == "bfloat16" else 5e-3)


def test_a_second_run_changes_nothing(float32):
    model = canonical(float32, "static", "bfloat16")
    run_passes(model, PASS)
    before = snapshot(model)
    (report,) = run_passes(model, PASS)
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_wider_types_are_not_stored_and_the_reason_says_so(scout):
    """A BF16 checkpoint: the router is computed with in float32, everything else as it is stored."""
    model = canonical(scout, "static", "bfloat16")
    before = snapshot(model)
    (report,) = run_passes(model, PASS)
    reason = "BFLOAT16 is stored and FLOAT computed with, which is wider"
    assert report.fired == 0
    assert dict(report.skipped) == {f"model.layers.{i}.feed_forward.router.weight": reason for i in range(4)}
    assert snapshot(model) == before


def test_float16_for_bfloat16_is_as_wide(scout):
    model = canonical(scout, "static", "float16")
    (report,) = run_passes(model, PASS)
    assert report.fired == 4 * 11 + 2
    assert len(report.skipped) == 4


def test_float32_computation_keeps_bfloat16_files(scout):
    model = canonical(scout, "static", "float32")
    before = snapshot(model)
    (report,) = run_passes(model, PASS)
    assert report.fired == 0
    assert len(report.skipped) == sum(
        isinstance(node.inputs[0].const_value, ir.TensorProtocol) for node in model.graph if node.op_type == "Cast"
    )
    assert snapshot(model) == before


def test_quantized_weights_are_none_of_its_business(float32):
    model = canonical(float32, "static", "bfloat16")
    run_passes(model, "outline_attention", "fuse_experts", "quantize_weights", recipe=load_recipe("int4"))
    before = stored(model)
    run_passes(model, PASS)
    after = stored(model)
    quantized = {name for name in before if name.endswith(("_int4", "_scale"))}
    assert quantized
    assert all(after[name] is before[name] for name in quantized)


def test_a_tied_weight_is_stored_twice_only_where_it_is_used_in_two_types(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, dtype="float32", tie_word_embeddings=True))
    model = canonical(checkpoint, "static", "bfloat16")
    ids = token_ids(1)
    expected = InPlaceClient(model, checkpoint.config, "bfloat16").logits(ids, [29])
    run_passes(model, PASS)
    assert np.array_equal(InPlaceClient(model, checkpoint.config, "bfloat16").logits(ids, [29]), expected)
