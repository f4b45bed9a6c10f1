"""``--verify-passes``: silent on every pass that is right, loud on one that is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.errors import CheckFailed, InputError
from l4convert.graph_passes import CANONICAL_PASSES, verification
from l4convert.graph_passes.base import Outcome, Pass
from l4convert.graph_passes.verification import Probes, probe_feeds, verified
from l4convert.progress import NO_PROGRESS
from l4convert.quantization.recipe import load_recipe
from l4convert.targets import TARGETS
from tests.checkpoints import write_random_checkpoint
from tests.graph_passes.mutations import constant, insert_after, node, replace_input
from tests.graphs import canonical

NONE = load_recipe("none")
# Every layout, target, form of the cache and recipe at least once.
CASES = [
    ("scout", "cpu", "growing", "int4"),
    ("scout", "cpu", "static", "fp8-experts"),
    ("maverick", "cpu", "windowed", "fp8"),
    ("maverick", "portable", "static", "int4"),
    ("unfused", "cpu", "static", "none"),
    ("unfused maverick, top-2", "portable", "growing", "fp8"),
    ("top-2", "portable", "windowed", "none"),
    ("tied with biases", "cpu", "growing", "int4"),
    ("all global", "portable", "growing", "fp8-experts"),
]


@pytest.mark.parametrize(("layout", "target", "kv_cache", "recipe"), CASES)
def test_every_pass_of_every_target_is_verified(layouts, layout, target, kv_cache, recipe):
    checkpoint = layouts[layout]
    model, rules = canonical(checkpoint, kv_cache), load_recipe(recipe)
    for graph_pass in (*CANONICAL_PASSES, *TARGETS[target].lowering):
        report = verified(graph_pass, model, rules, Probes(checkpoint.config, kv_cache), NO_PROGRESS)
        assert report.name == graph_pass.name


@pytest.mark.parametrize(
    ("layout", "target", "recipe", "compute"),
    [
        ("maverick", "tensorrt-rtx", "fp8", "bfloat16"),
        ("top-2", "tensorrt", "int4", "float16"),
    ],
)
def test_every_pass_is_verified_in_every_compute_type(layouts, layout, target, recipe, compute):
    checkpoint, rules = layouts[layout], load_recipe(recipe)
    model = canonical(checkpoint, "static", compute)
    probes = Probes(checkpoint.config, "static", compute, in_place=True)
    for graph_pass in (*CANONICAL_PASSES, *TARGETS[target].lowering):
        verified(graph_pass, model, rules, probes, NO_PROGRESS)


def _negate_the_values(model: ir.Model, recipe: Any) -> Outcome:
    insert_after(model, "layers.1/self_attn/v_proj", "Neg")
    return Outcome(1)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_rounded_activations_hide_no_wrong_pass(scout, compute):
    """Their tolerance is wide, because a rounding may fall to the other side; a wrong sign is further off."""
    probes = Probes(scout.config, "growing", compute)
    with pytest.raises(CheckFailed, match=r"pass negate: inside a chunk: .* differs by"):
        verified(
            Pass("negate", "does harm", _negate_the_values),
            canonical(scout, "growing", compute),
            load_recipe("fp8"),
            probes,
            NO_PROGRESS,
        )


def test_probes_of_in_place_graphs_stay_in_a_chunk_with_padding_last(scout):
    probes = Probes(scout.config, "static", "bfloat16", in_place=True)
    for name, feeds in probe_feeds(probes):
        new = feeds["input_ids"].shape[1]
        mask = feeds["attention_mask"]
        lengths = mask[:, :-new].sum(axis=1)
        assert (lengths % 8 + new <= 8).all(), name
        assert (np.diff(mask[:, -new:], axis=1) <= 0).all(), name
        assert {feeds[f"past_key_values.{i}.key"].dtype.name for i in range(4)} == {"bfloat16"}


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_of_any_size(tmp_path, chunk):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, attention_chunk_size=chunk, num_hidden_layers=2))
    for kv_cache in ("growing", "windowed", "static"):
        model = canonical(checkpoint, kv_cache)
        verified(CANONICAL_PASSES[0], model, NONE, Probes(checkpoint.config, kv_cache), NO_PROGRESS)


def _scale_the_values(model: ir.Model, recipe: Any) -> Outcome:
    insert_after(model, "layers.1/self_attn/v_proj", "Mul", constant(model, 1.001))
    return Outcome(1)


def _look_over_the_boundary(model: ir.Model, recipe: Any) -> Outcome:
    """Right inside a chunk, wrong across its end."""
    replace_input(model, "layers.0/self_attn/And", 1, node(model, "layers.0/self_attn/LessOrEqual").outputs[0])
    return Outcome(1)


def _spoil_a_cache(model: ir.Model, recipe: Any) -> Outcome:
    present = model.graph.outputs[-1]
    spoiled = ir.Node("", "Add", [present, constant(model, 0.01)], num_outputs=1, name="spoiled")
    model.graph.append(spoiled)
    present.name, spoiled.outputs[0].name = "inner", present.name
    spoiled.outputs[0].type, spoiled.outputs[0].shape = present.type, present.shape
    model.graph.outputs[-1] = spoiled.outputs[0]
    return Outcome(1)


def _divide_by_zero(model: ir.Model, recipe: Any) -> Outcome:
    last_norm = node(model, "lm_head").inputs[0].producer()
    insert_after(model, last_norm.name, "Div", constant(model, 0.0))
    return Outcome(1)


def _drop_an_output(model: ir.Model, recipe: Any) -> Outcome:
    del model.graph.outputs[-1]
    return Outcome(1)


def _name_an_operator_that_is_none(model: ir.Model, recipe: Any) -> Outcome:
    node(model, "layers.0/self_attn/And").op_type = "Nand"
    return Outcome(1)


def _gather_beyond_the_table(model: ir.Model, recipe: Any) -> Outcome:
    """The model loads; a call fails."""
    beyond = constant(model, 1000, np.int64)
    insert_after(model, "layers.0/self_attn/Mod", "Add", beyond)
    return Outcome(1)


BROKEN = {
    _drop_an_output: "inside a chunk: present.3.value is no output any more",
    _name_an_operator_that_is_none: "the graph does not run any more: .*Nand",
    _gather_beyond_the_table: "the graph does not run any more: .*Gather",
    _scale_the_values: "logits differs by .*, more than",
    _look_over_the_boundary: "across a boundary: logits differs by",
    _spoil_a_cache: "inside a chunk: present.3.value differs by",
    _divide_by_zero: "inside a chunk: logits is not finite",
}


@pytest.mark.parametrize("run", BROKEN, ids=lambda f: f.__name__.strip("_"))
def test_a_broken_pass_is_named_with_the_output(scout, run):
    broken = Pass("break_it", "does harm", run)
    with pytest.raises(CheckFailed, match=f"pass break_it: .*{BROKEN[run]}"):
        verified(broken, canonical(scout), NONE, Probes(scout.config, "growing"), NO_PROGRESS)


@pytest.mark.parametrize(("run", "caught"), [(_scale_the_values, False), (_divide_by_zero, True)])
def test_quantization_may_change_numbers_but_not_make_nan(scout, run, caught):
    lossy = Pass("quantize_badly", "rounds", run, exact=False)
    if caught:
        with pytest.raises(CheckFailed, match="pass quantize_badly: inside a chunk: logits is not finite"):
            verified(lossy, canonical(scout), NONE, Probes(scout.config, "growing"), NO_PROGRESS)
    else:
        assert verified(lossy, canonical(scout), NONE, Probes(scout.config, "growing"), NO_PROGRESS).fired == 1


def test_a_pass_in_the_table_that_is_broken_stops_the_conversion(scout, tmp_path, monkeypatch):
    from l4convert import conversion, pipeline

    first, *others = conversion.CANONICAL_PASSES
    monkeypatch.setattr(conversion, "CANONICAL_PASSES", (dataclasses.replace(first, run=_scale_the_values), *others))
    options = pipeline.ConvertOptions(scout.path, tmp_path / "out", verify_passes=True)
    with pytest.raises(CheckFailed, match="pass outline_attention: "):
        pipeline.convert(options)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_does_not_fit_in_memory_is_refused_before_it_runs(scout, monkeypatch):
    monkeypatch.setattr(verification, "available_bytes", lambda: 1_000_000)
    model = canonical(scout)
    with pytest.raises(InputError, match=r"takes about 0\.0 GB of memory; 0\.0 GB are free"):
        verified(CANONICAL_PASSES[0], model, NONE, Probes(scout.config, "growing"), NO_PROGRESS)
    assert any(n.op_type == "Attention" for n in model.graph)  # the pass did not run


def test_probes_cross_a_boundary_and_have_padding(scout):
    cases = dict(probe_feeds(Probes(scout.config, "static")))
    chunk = scout.config.attention_chunk_size
    across = cases["across a boundary"]["attention_mask"].shape[1]
    assert across - 7 < chunk < across
    assert cases["inside a chunk"]["attention_mask"].shape[1] <= chunk
    assert (cases["padded batch"]["attention_mask"] == 0).any()
    again = dict(probe_feeds(Probes(scout.config, "static")))
    for name, feeds in cases.items():
        assert all(np.array_equal(value, again[name][key]) for key, value in feeds.items())
