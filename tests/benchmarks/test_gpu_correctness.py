"""The check of kernels against their functions' bodies: right answers pass, wrong ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks.scripts import load
from tests.benchmarks.small_cases import GROUPS, SCALE, some

cases = load("gpu_cases")
correctness = load("gpu_correctness")
library = load("gpu_library")
reference = load("gpu_reference")
report = load("gpu_report")
tensors = load("gpu_tensors")


def maker(compute: str) -> Any:
    return tensors.Maker(torch, "cpu", compute)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Answers:
    """Kernels that write what the body gives, and then what a test does to that."""

    sm = 90

    def __init__(self, spoil: Callable[[Any], None]) -> None:
        self.spoil = spoil

    def synchronize(self) -> None:
        pass

    def lacks(self, compute: str) -> str:
        return ""

    def moe(self, experts: Any, compute: str, call: Any) -> Callable[[], None]:
        group = GROUPS["MoE int4 block 32 bfloat16"]
        (spec,) = [case.spec for case in group.cases if case.experts == experts]
        return lambda: self._write([(call.y, reference.moe_body(torch, spec, experts, call))], call)

    def attention(self, spec: Any, call: Any) -> Callable[[], None]:
        outputs = reference.attention_body(torch, spec, call)
        real = call.positions[:, -call.query.shape[1] :] >= 0
        outputs = (np.where(real[..., None].numpy(), outputs[0], 0), *outputs[1:])
        names = ("attention", "past_key", "past_value")
        found = [(getattr(call, name), value) for name, value in zip(names, outputs, strict=True)]
        return lambda: self._write(found, call)

    def _write(self, outputs: list[tuple[Any, np.ndarray]], call: Any) -> None:
        for tensor, value in outputs:
            tensor.copy_(torch.from_numpy(np.asarray(value)).to(tensor.dtype))
        self.spoil(call)


def nothing(call: Any) -> None:
    pass


def checked(spoil: Callable[[Any], None], name: str, *numbers: int) -> Any:
    return correctness.check(Answers(spoil), maker, some(name, *numbers))


def test_right_answers_pass() -> None:
    assert checked(nothing, "MoE int4 block 32 bfloat16", 0, 1).error < 4e-3  # of rounding y to bfloat16 once
    found = checked(nothing, "chunked attention bfloat16, int8 cache", 4, 9, 14)
    assert found.passed
    assert found.cases == 3


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("MoE int4 block 32 bfloat16", lambda call: call.y.mul_(1.02), ""),
        ("MoE int4 block 32 bfloat16", lambda call: call.y[-1].fill_(float("nan")), ""),
        ("chunked attention bfloat16, int8 cache", lambda call: call.attention.mul_(0.98), ""),
        ("chunked attention bfloat16, int8 cache", lambda call: call.past_value.add_(8), "slots were written"),
        ("chunked attention bfloat16, int8 cache", lambda call: call.attention[:, -1].fill_(1.0), "rows of padding"),
    ],
)
def test_wrong_answers_fail(name: str, spoil: Callable[[Any], None], problem: str) -> None:
    number = 9 if "attention" in name else 1
    found = checked(spoil, name, number)
    assert not found.passed
    assert problem in found.problem
    assert math.isnan(found.error) or found.error > 1e-2
    assert str(GROUPS[name].cases[number]) == found.worst
    assert "| FAIL |" in report.correctness_section("", [found]).markdown()


def test_what_a_device_does_not_have_is_not_measured_and_what_is_refused_fails() -> None:
    old = SimpleNamespace(sm=80)
    found = correctness.check(old, maker, GROUPS["MoE fp8 bfloat16"])
    assert (found.passed, found.measured, found.problem) == (True, False, "not measured: needs SM 89")
    assert "| MoE fp8 bfloat16 | not measured: needs SM 89 |" in report.correctness_section("", [found]).markdown()

    def refuse(*arguments: Any) -> Any:
        raise library.Refused("no kernel")

    kernels = SimpleNamespace(sm=90, moe=refuse, lacks=lambda compute: "")
    found = correctness.check(kernels, maker, GROUPS["MoE fp8 bfloat16"])
    assert (found.passed, found.problem) == (False, "refused: no kernel")


def test_cases_are_ragged_and_at_the_edges() -> None:
    group = GROUPS["chunked attention bfloat16, bfloat16 cache"]
    single = [case.sequences[0].past for case in group.cases if case.new == 1 and len(case.sequences) == 1]
    assert {30, 31, 32, 33, 10_485_759} <= set(single)  # C - 2 to C + 1, and Scout's last
    ragged = [case for case in group.cases if any(sequence.count < case.new for sequence in case.sequences)]
    assert {case.new for case in ragged} >= {1, 45}  # one of less and one of more than a chunk
    for case in ragged:
        positions = case.positions
        for row, sequence in zip(positions, case.sequences, strict=True):
            assert np.array_equal(row[row >= 0], np.arange(sequence.past + sequence.count))
            assert (row[-case.new :] >= 0).sum() == sequence.count
    moe = [case for group in GROUPS.values() if group.name.startswith("MoE") for case in group.cases]
    assert {case.spec.top_k for case in moe} == {1, 2}
    assert all(len(set(row)) == case.spec.top_k for case in moe for row in case.chosen)


def test_a_seed_gives_the_same_cases_and_another_one_others() -> None:
    def shapes(seed: int) -> list[str]:
        return [str(case) for group in cases.groups(SCALE, seed) for case in group.cases]

    assert shapes(3) == shapes(3) != shapes(4)


@pytest.mark.parametrize(("actual", "error"), [([3.0, 4.0], 0.0), ([3.0, 4.5], 0.1), ([math.nan, 4.0], math.nan)])
def test_relative_error(actual: list[float], error: float) -> None:
    found = correctness.relative_error(np.array(actual), np.array([3.0, 4.0]))
    assert found == pytest.approx(error, nan_ok=True)


def test_relative_error_of_zeros() -> None:
    assert correctness.relative_error(np.zeros(2), np.zeros(2)) == 0
    assert correctness.relative_error(np.ones(2), np.zeros(2)) == math.inf


@pytest.mark.parametrize(("code", "failed"), [(5, False), (3, True)])
def test_a_build_that_ends_early_says_why(monkeypatch: pytest.MonkeyPatch, code: int, failed: bool) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        assert "TRITON_INTERPRET" not in options["env"]
        commands.append(command[2:])
        return SimpleNamespace(returncode=code, stderr="compiling\nerror: cmake is not installed: pip install cmake\n")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(library.subprocess, "run", run)
    with pytest.raises(library.NotBuilt, match=r"^cmake is not installed: pip install cmake$") as caught:
        library.build_for(90)
    assert caught.value.failed is failed
    assert commands[0][:5] == ["l4convert", "plugins", "build", "--sm", "90"]
