"""The checks of `make gpu` on the CPU: the same code, library and kernels as on a GPU, over a stand-in driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.benchmarks.scripts import load
from tests.plugins.host_kernels import HostKernels

cases = load("gpu_cases")
correctness = load("gpu_correctness")
tensors = load("gpu_tensors")

SCALE = cases.Scale(
    tokens=(3, 20), experts=(4,), widths=(128,), head_dim=16, key_heads=(1, 2), chunk=32, lengths=70, new=45
)
GROUPS = {group.name: group for group in cases.groups(SCALE)}


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("chunked attention bfloat16, fp8 cache", (4, 9)),  # ragged batches: single tokens, and a few
        ("global attention float16, float16 cache", (2,)),
    ],
)
def test_kernels_equal_their_functions_bodies(
    make_gpu: Callable[..., Any], name: str, numbers: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    group = GROUPS[name]
    some = replace(group, cases=tuple(group.cases[number] for number in numbers))  # a case takes about a second
    kernels = HostKernels(make_gpu(sm=90, multiprocessors=4))
    result = correctness.check(kernels, lambda compute: tensors.Maker(torch, "cpu", compute), some)
    assert result.passed, result
    assert result.cases == len(numbers)
    assert 0 < result.error < 1e-2
