"""The table of a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from safetensors import safe_open

from l4convert.checkpoint import open_checkpoint
from l4convert.pipeline import ConvertOptions, PlanOptions, convert, plan_conversion
from l4convert.planning import KINDS
from tests.checkpoints import write_random_checkpoint
from tests.planning.conversions import RECIPES, TARGETS

QUANTIZED = {"none": set(), "int4": {"INT4", "UINT8"}, "fp8": {"FLOAT8E4M3FN"}, "fp8-experts": {"FLOAT8E4M3FN"}}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_is_where_the_table_says(nano: Path, tmp_path: Path, recipe: str, target: str):
    options = ConvertOptions(nano, tmp_path / "out", recipe=recipe, target=target)
    plan = plan_conversion(options)
    convert(options)
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        names = {name for name in file.keys() if not name.startswith("__padding__")}  # noqa: SIM118  # not a dict
    stored = [row for row in plan.table if row.file == "model.safetensors"]
    assert {row.name for row in stored} == names
    assert all(row.offset is not None and row.offset % 4096 == 0 for row in stored)
    end = (tmp_path / "out" / "model.safetensors").stat().st_size
    for row, following in zip(stored, [*stored[1:], None], strict=True):
        stop = row.offset + row.bytes
        assert stop == end if following is None else stop <= following.offset < stop + 4096
    for name, nbytes in plan.files.items():
        assert (tmp_path / "out" / name).stat().st_size == nbytes, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_schemes_follow_the_dtype(nano: Path, recipe: str, target: str):
    table = plan_conversion(PlanOptions(nano, recipe=recipe, target=target)).table
    expected = {"int4": "int4 block 32 lse", "fp8": "fp8", "fp8-experts": "fp8"}.get(recipe)
    for row in table:
        if row.dtype in QUANTIZED[recipe] or row.kind == "scales":
            assert row.scheme == expected, row
        else:
            assert row.scheme == "none", row
    assert {row.kind for row in table} <= set(KINDS)
    assert any(row.kind == "scales" for row in table) is (recipe != "none")


def test_sources_are_the_checkpoints_tensors_and_all_of_them(nano: Path):
    table = plan_conversion(PlanOptions(nano)).table
    assert {name for row in table for name in row.sources} == open_checkpoint(nano).tensors.keys()


def test_kinds_of_a_model_with_dense_layers(maverick_layout: Path):
    plan = plan_conversion(PlanOptions(maverick_layout, recipe="none"))
    config = open_checkpoint(maverick_layout).config
    sizes = {
        "experts": 2 * 4 * 3 * 64 * 64,
        "router": 2 * 4 * 64,
        "shared expert": 2 * 3 * 64 * 64,
        "dense MLP": 2 * 3 * 64 * config.intermediate_size_mlp,
        "attention": 4 * (2 * 64 * 64 + 2 * 32 * 64),
        "embedding, head": 2 * 128 * 64,
        "norms": 9 * 64,
    }
    found = {kind: nbytes for kind, (_, nbytes) in plan.kinds.items()}
    found.pop("rotary tables, constants", None)  # a chunk of 8 tokens has tables that are small enough for model.onnx
    assert found == {kind: 2 * number for kind, number in sizes.items()}  # BF16
    norms = [row for row in plan.table if row.kind == "norms"]
    assert {(row.file, row.offset) for row in norms} == {("model.onnx", None)}  # less than a kilobyte each


def test_unfused_experts_name_every_source(tmp_path: Path):
    checkpoint = write_random_checkpoint(tmp_path / "unfused", unfused=True)
    rows = [row for row in plan_conversion(PlanOptions(checkpoint)).table if row.kind == "experts"]
    assert rows
    joined = {name for row in rows for name in row.sources}
    assert joined == {name for name in open_checkpoint(checkpoint).tensors if ".experts." in name}


def test_both_kinds_of_options_give_one_plan(nano: Path, tmp_path: Path):
    out = tmp_path / "out"
    plans = [plan_conversion(options) for options in (ConvertOptions(nano, out), PlanOptions(nano, output=out))]
    first, second = (dataclasses.replace(plan, memory=plans[0].memory, disk=plans[0].disk) for plan in plans)
    assert first == second
