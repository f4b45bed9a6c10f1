"""Attention over caches that are written in place: in both of its forms, equal to transformers in any split."""

from __future__ import annotations

import numpy as np
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.graph_passes import lower_attention_to_tensor_scatter as lowering
from tests.checkpoints import write_random_checkpoint
from tests.graphs import (
    SPLITS,
    TOKENS,
    canonical,
    op_counts,
    reference_logits,
    relative_error,
    run_passes,
    snapshot,
    token_ids,
)
from tests.in_place import InPlaceClient

PASSES = ("outline_attention", "lower_attention_to_tensor_scatter")


@pytest.fixture(scope="module")
def expected(layouts):
    """transformers' logits [2,T,vocab] of the tokens that all tests here feed."""
    names = ("scout", "maverick", "all global")
    return {name: reference_logits(layouts[name].path, token_ids(2)) for name in names}


@pytest.fixture(autouse=True)
def kernels_for_small_heads(monkeypatch):
    """Heads are folded only where TensorRT has kernels of their width; those of the test models have 16."""
    monkeypatch.setattr(lowering, "FUSED_WIDTHS", (16,))


def lowered_client(checkpoint):
    model = canonical(checkpoint, "static")
    _, report = run_passes(model, *PASSES)
    assert (report.fired, report.skipped) == (4, ())
    return model, InPlaceClient(model, checkpoint.config)


# A chunk of 8 counts as small or not; a global cache never does: its attention is folded.
@pytest.mark.parametrize("small_cache", [lowering.SMALL_CACHE, 7], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["scout", "maverick", "all global"])
def test_any_split_gives_the_logits_of_transformers(layouts, expected, monkeypatch, layout, small_cache):
    monkeypatch.setattr(lowering, "SMALL_CACHE", small_cache)
    checkpoint, ids = layouts[layout], token_ids(2)
    _, client = lowered_client(checkpoint)
    for splits in (*SPLITS, [1] * TOKENS, [8, 8, 8, 5]):
        error = relative_error(client.logits(ids, splits), expected[layout])
        assert error <= 1e-5, splits


@pytest.mark.parametrize("small_cache", [lowering.SMALL_CACHE, 7], ids=["small", "large"])
def test_a_batch_of_unequal_rows_gives_each_what_it_gets_alone(scout, expected, monkeypatch, small_cache):
    """Padding in front, behind and between; the rows' chunks end in different calls."""
    monkeypatch.setattr(lowering, "SMALL_CACHE", small_cache)
    _, client = lowered_client(scout)
    ids = token_ids(2)
    mask = np.ones_like(ids)
    mask[0, :5] = mask[1, -9:] = mask[1, 10:13] = 0
    padded = np.zeros_like(ids)
    for row in range(2):
        padded[row, mask[row] > 0] = ids[row, : mask[row].sum()]
    for splits in ([TOKENS], [17, 12], [1] * TOKENS):
        actual = client.logits(padded, splits, mask)
        for row in range(2):
            real = actual[row, mask[row] > 0]
            assert relative_error(real, expected["scout"][row, : len(real)]) <= 1e-5, (splits, row)


def test_caches_are_written_by_tensor_scatter_and_read_whole(scout, monkeypatch):
    monkeypatch.setattr(lowering, "SMALL_CACHE", 7)  # both forms are the same nodes here: none copies a cache
    model, _ = lowered_client(scout)
    assert op_counts(model)["TensorScatter"] == 8
    assert op_counts(model)["Attention"] == 4
    assert dict(model.graph.opset_imports) == {"": lowering.OPSET}
    for number in range(4):
        for part in ("key", "value"):
            (past,) = [v for v in model.graph.inputs if v.name == f"past_key_values.{number}.{part}"]
            (present,) = [v for v in model.graph.outputs if v.name == f"present.{number}.{part}"]
            assert present.producer().op_type == "TensorScatter"
            assert present.producer().inputs[0] is past
            assert {node.op_type for node, _ in present.uses()} == {"Attention"}
            assert {node.op_type for node, _ in past.uses()} <= {"TensorScatter", "Shape"}


@pytest.mark.parametrize(("small_cache", "folded"), [(8, [False] * 3 + [True]), (7, [True] * 4)])
def test_large_caches_are_attended_to_once_for_the_heads_that_share_them(scout, monkeypatch, small_cache, folded):
    monkeypatch.setattr(lowering, "SMALL_CACHE", small_cache)
    model, _ = lowered_client(scout)
    masks = [node.inputs[3].producer().op_type for node in model.graph if node.op_type == "Attention"]
    assert [op == "Reshape" for op in masks] == folded  # the mask of the heads' tokens one after another


@pytest.mark.parametrize("kv_cache", ["growing", "windowed"])
def test_a_cache_that_grows_is_left_with_the_reason(scout, kv_cache):
    model = canonical(scout, kv_cache)
    run_passes(model, "outline_attention")
    before = snapshot(model)
    (report,) = run_passes(model, "lower_attention_to_tensor_scatter")
    forms = {kv_cache, "growing"}  # a global layer keeps all slots in either form
    reasons = {f"the cache is {form}; only a static one can be written in place" for form in forms}
    assert (report.fired, {why for _, why in report.skipped}, len(report.skipped)) == (0, reasons, 4)
    assert snapshot(model) == before


def test_a_second_run_changes_nothing(scout):
    model, _ = lowered_client(scout)
    before = snapshot(model)
    (report,) = run_passes(model, "lower_attention_to_tensor_scatter")
    assert (report.fired, report.skipped) == (0, ())
    assert snapshot(model) == before


def test_a_wrong_slot_would_show(scout, expected, monkeypatch):
    """What these tests compare depends on where tokens are written, and on what the mask lets them see."""
    original, ids = lowering.visible_slots, token_ids(2)

    def one_more(b, start, new, capacity):
        return original(b, b.op("Add", start, b.constant(1)), new, capacity)

    monkeypatch.setattr(lowering, "visible_slots", one_more)
    _, client = lowered_client(scout)
    assert relative_error(client.logits(ids, [TOKENS]), expected["scout"]) > 1e-3


def test_heads_of_a_width_that_no_kernel_takes_are_not_folded(scout, expected, monkeypatch):
    monkeypatch.setattr(lowering, "FUSED_WIDTHS", (64, 128))
    model, client = lowered_client(scout)
    masks = {node.inputs[3].producer().op_type for node in model.graph if node.op_type == "Attention"}
    assert masks == {"Unsqueeze"}
    assert relative_error(client.logits(token_ids(2), [TOKENS]), expected["scout"]) <= 1e-5


def test_one_head_for_each_key_head_is_not_folded(tmp_path):
    path = write_random_checkpoint(tmp_path, num_key_value_heads=4, num_hidden_layers=4)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.num_attention_heads == 4
    model, client = lowered_client(checkpoint)
    masks = {node.inputs[3].producer().op_type for node in model.graph if node.op_type == "Attention"}
    assert masks == {"Unsqueeze"}
    ids = token_ids(1)
    assert relative_error(client.logits(ids, [6, 23]), reference_logits(path, ids)) <= 1e-5
