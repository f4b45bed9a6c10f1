"""Scout, planned once for all tests of its use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from l4convert.checkpoint.presets import SCOUT
from l4convert.pipeline import PlanOptions, plan_conversion
from l4convert.planning import ConversionPlan
from l4convert.planning.serving import plan_serving
from l4convert.planning.use import Artifact, ServingPlan, Wanted
from l4convert.quantization.recipe import load_recipe
from l4convert.targets.hardware import load_hardware


@pytest.fixture(scope="package")
def plan() -> ConversionPlan:
    """Scout in INT4 on H100s, all of its positions."""
    return plan_conversion(PlanOptions(preset="scout", target="h100", context="10M"))


@pytest.fixture(scope="package")
def scout(plan: ConversionPlan) -> ServingPlan:
    assert plan.serving is not None
    return plan.serving


@pytest.fixture(scope="package")
def serving(plan: ConversionPlan) -> Callable[..., ServingPlan]:
    """Plans the use of the same weights elsewhere; ``target`` and ``form`` are for arithmetic, not for real graphs."""

    def run(
        hardware: str | None, context: int | None, *, target: str = "tensorrt", form: str = "static", **changes: Any
    ) -> ServingPlan:
        artifact = Artifact(SCOUT, plan.table, load_recipe("int4", 128), target, form, "bfloat16", ("fp8",))
        machine = None if hardware is None else load_hardware(hardware)
        wanted = Wanted(context, 1, 512, None, machine)
        return plan_serving(artifact, dataclasses.replace(wanted, **changes))

    return run
