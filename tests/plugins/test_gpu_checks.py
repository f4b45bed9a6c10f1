"""The checks of `make gpu` on the CPU: the same code, library and kernels as on a GPU, over a stand-in driver."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.benchmarks.scripts import load
from tests.benchmarks.small_cases import GROUPS, some
from tests.plugins import interpreter
from tests.plugins.host_kernels import HostKernels, HostPluginKernels

cases = load("gpu_cases")
correctness = load("gpu_correctness")
roofline = load("roofline")
speed = load("gpu_speed")
tensors = load("gpu_tensors")
workloads = load("gpu_workloads")


@pytest.mark.parametrize(
    ("through", "name", "numbers"),
    [
        (HostKernels, "chunked attention bfloat16, fp8 cache", (4, 9)),  # ragged batches: single tokens, and a few
        (HostKernels, "global attention float16, float16 cache", (2,)),
        (HostKernels, "MoE int4 block 64 bfloat16", (0,)),
        (HostPluginKernels, "global attention bfloat16, int8 cache", (1,)),
        (HostPluginKernels, "MoE fp8 float16", (0,)),
    ],
)
def test_kernels_equal_their_functions_bodies(
    make_gpu: Callable[..., Any], through: Any, name: str, numbers: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    kernels = through(make_gpu(sm=90, multiprocessors=4))
    result = correctness.check(kernels, lambda compute: tensors.Maker(torch, "cpu", compute), some(name, *numbers))
    assert result.passed, result
    assert result.cases == len(numbers)
    assert result.error < GROUPS[name].bound


def test_types_that_a_library_was_built_without_are_not_measured(
    make_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = HostKernels(make_gpu(sm=90))
    only = tuple(kernel for kernel in kernels.library.kernels if "fp16" not in kernel.name)
    monkeypatch.setitem(kernels.library.__dict__, "kernels", only)
    result = correctness.check(kernels, lambda compute: pytest.fail("made"), GROUPS["MoE plain float16"])
    assert (result.passed, result.problem) == (True, "not measured: the library was built without --compute fp16")
    assert not kernels.lacks("bfloat16")


@pytest.fixture
def bench(make_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measures on the stand-in: every call runs once and took a millisecond, in torch two."""

    def timed(_: Any, calls: Any, estimate: float) -> float:
        assert estimate > 0
        if calls[0].__module__ != HostKernels.__module__:
            return 2e-3
        for call in calls:
            call()
        return 1e-3

    monkeypatch.setattr(speed, "timed", timed)
    limits = roofline.Limits(1e9, {"bf16": 1e12, "fp8": 2e12})
    return speed.Bench(torch, HostKernels(make_gpu(sm=90, multiprocessors=4)), limits, 8 << 30, cache=1 << 12)


@pytest.mark.parametrize(("weights", "block"), [("int4", 128), ("fp8", 0)])
def test_rows_of_experts_are_measured_and_compared_with_torch(bench: Any, weights: str, block: int) -> None:
    row = workloads.MoeRow("some", roofline.Experts(4, 128, 128, 1, weights, block), 2)
    result = one(bench, row)
    assert (result.seconds, result.torch_seconds, result.passed) == (1e-3, 2e-3, True)
    assert result.difference < speed.LARGEST_DIFFERENCE[row.work.rate]


def one(bench: Any, row: Any) -> Any:
    (result,) = bench.measured([row], lambda name: None)
    return result


@pytest.mark.parametrize(("chunk", "new", "context"), [(64, 1, 40), (0, 20, 50)])
def test_rows_of_attention_are_measured_and_compared_with_torch(bench: Any, chunk: int, new: int, context: int) -> None:
    row = workloads.AttentionRow("some", roofline.Attention(5, 1, 16, chunk), 1, new, context)
    result = one(bench, row)
    assert (result.seconds, result.torch_seconds, result.passed) == (1e-3, 2e-3, True)
    assert 0 < result.difference < 0.01
    assert result.notes[0].startswith("onnxruntime: ")


def test_a_row_that_does_not_fit_or_fails_does_not_stop_the_others(bench: Any) -> None:
    layer = roofline.Attention(5, 1, 16, 0)
    large = workloads.AttentionRow("large", layer, 64, 1, 1 << 21)
    wide = workloads.AttentionRow("wide", roofline.Attention(20, 1, 16, 0), 1, 1, 20)
    first, second = bench.measured([large, wide], lambda name: None)
    assert first.problem.startswith("not measured: needs ")
    assert first.passed
    assert "20 query heads to a key/value head are too many" in second.problem
    assert not second.passed


def test_the_part_of_the_kernels_as_a_whole(
    bench: Any, make_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load("gpu_kernels")
    shrunk = replace(GROUPS["global attention float16, float16 cache"], cases=GROUPS["MoE plain float16"].cases[:1])
    row = workloads.AttentionRow("global attention", roofline.Attention(5, 1, 16, 0), 1, 1, 20)
    monkeypatch.setattr(part, "groups", lambda scale, seed: [shrunk, GROUPS["MoE fp8 bfloat16"]])
    monkeypatch.setattr(part, "PluginKernels", lambda *arguments: HostPluginKernels(kernels.gpu))
    monkeypatch.setattr(part, "ROWS", (row, *workloads.MOE))
    kernels = HostKernels(make_gpu(sm=90, multiprocessors=4))
    found = part.run(torch, kernels, bench.limits, (8 << 30, 1 << 12), "attention", 0)
    assert found.passed
    assert found.measured
    checked, plugged, timed = (section.markdown() for section in found.sections)
    assert "| pass |" in checked
    assert "| pass |" in plugged
    assert "not slower than torch: met" in timed
    assert "not measured in 1 rows: onnxruntime: " in timed
    (speed_row,) = found.content["speed"]
    assert speed_row["aims"] == {"80% of copy": False, "not slower than torch": True}
    assert json.loads(json.dumps(part.finite(found.content))) == found.content
    monkeypatch.setattr(kernels, "moe", lambda *arguments: raising)
    monkeypatch.setattr(part, "ROWS", ())
    found = part.run(torch, kernels, bench.limits, (8 << 30, 1 << 12), "attention", 0)
    assert not found.passed
    assert "failed: RuntimeError: CUDA error: an illegal memory access" in found.sections[0].markdown()


def raising() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Nowhere:
    """A tensor that has a shape and an address, and no memory."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def data_ptr(self) -> int:
        return 1 << 45


def tensors_of(case: Any) -> Any:
    """What a case's call is made of, as far as the launch code looks at it."""
    if isinstance(case, cases.MoeCase):
        here = Nowhere(len(case.chosen))
        return tensors.MoeTensors(here, here, tensors.Weights(here, here, here, here), here)
    batch, rotates = len(case.sequences), case.spec.rope
    query, cache = Nowhere(batch, case.new), Nowhere(batch, 0, case.slots)
    positions = Nowhere(batch, cases.columns(case.sequences, case.new))
    table = Nowhere(case.spec.chunk_size) if rotates else None
    return tensors.AttentionTensors(query, query, query, cache, cache, positions, table, table, query, query, query)


@pytest.mark.parametrize("sm", [80, 90])
def test_the_random_shapes_reach_every_kernel_of_the_library(
    make_gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, sm: int
) -> None:
    monkeypatch.setattr(interpreter, "run", lambda *arguments: None)
    gpu = make_gpu(sm=sm, multiprocessors=132)
    kernels = load("gpu_library").Kernels(torch, gpu.library.path, "cpu", sm, 132)
    for group in cases.groups(cases.Scale()):
        for case in group.cases if group.least_sm <= sm else ():
            made = tensors_of(case)
            if isinstance(case, cases.MoeCase):
                gpu.call(kernels.moe(case.experts, case.spec.compute, made))
            else:
                gpu.call(kernels.attention(case.spec, made))
    launched = {launch.kernel.name for launch in gpu.launches}
    built = {kernel.name for kernel in gpu.library.kernels if kernel.sm == sm}
    # On GPUs without warp-group instructions the tiles of INT4's two larger classes are the same, so one is never used.
    spare = {name for name in built if "int4" in name and name.endswith("_m128")} if sm != 90 else set()
    assert {name for name in built if name.startswith("moe") or name.endswith("_d128")} - launched <= spare
