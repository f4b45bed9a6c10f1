"""Kernels against their functions' bodies: the relative error of everything that a call writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gpu_cases import LARGEST_ERROR, AttentionCase, Case, Group, MoeCase
from gpu_library import Kernels, Refused
from gpu_reference import attention_body, moe_body, on_host
from gpu_tensors import Maker


@dataclass(frozen=True)
class Checked:
    """One group's outcome.

    Attributes:
        row: Of the table.
        cases: How many were run.
        error: The largest relative error; NaN where something was not written.
        bound: What it may be.
        worst: The case with that error.
        problem: Why it was not run, or the first thing that is wrong beside the error.
        measured: Whether it ran.
    """

    row: str
    cases: int = 0
    error: float = 0.0
    bound: float = LARGEST_ERROR
    worst: str = ""
    problem: str = ""
    measured: bool = True

    @property
    def passed(self) -> bool:
        return not self.measured or (not self.problem and self.error <= self.bound)


def check(kernels: Kernels, maker: Callable[[str], Maker], group: Group) -> Checked:
    """Run all cases of a group.

    Args:
        kernels: The library on the device.
        maker: Makes tensors there, for a compute type.
        group: Its cases.
    """
    if kernels.sm < group.least_sm:
        return Checked(group.name, problem=f"not measured: needs SM {group.least_sm}", measured=False)
    if lack := kernels.lacks(group.cases[0].spec.compute):
        return Checked(group.name, problem=f"not measured: {lack}", measured=False)
    done = Checked(group.name, bound=group.bound)
    for case in group.cases:
        try:
            error, problem = run_case(kernels, maker(case.spec.compute), case)
        except Refused as reason:
            return replace(done, worst=str(case), problem=f"refused: {reason}")
        except Exception as error:  # the table is to have every row
            line = " ".join(str(error).split())[:200]
            return replace(done, worst=str(case), problem=f"failed: {type(error).__name__}: {line}")
        if problem or not error <= done.error:  # NaN too
            done = replace(done, error=error, worst=str(case), problem=problem)
        done = replace(done, cases=done.cases + 1)
        if not done.passed:
            break
    return done


def run_case(kernels: Kernels, maker: Maker, case: Case) -> tuple[float, str]:
    """(largest relative error, what else is wrong or nothing)."""
    return _moe(kernels, maker, case) if isinstance(case, MoeCase) else _attention(kernels, maker, case)


def _moe(kernels: Kernels, maker: Maker, case: MoeCase) -> tuple[float, str]:
    tensors = maker.routed(case.experts, maker.weights(case.experts), case.chosen)
    kernels.moe(case.experts, case.spec.compute, tensors)()
    kernels.synchronize()
    expected = moe_body(maker.torch, case.spec, case.experts, tensors)
    return relative_error(on_host(maker.torch, tensors.y), expected), ""


def _attention(kernels: Kernels, maker: Maker, case: AttentionCase) -> tuple[float, str]:
    torch, positions = maker.torch, case.positions
    tensors = maker.attended(case.layer, positions, case.new, case.slots)
    before = [on_host(torch, cache).copy() for cache in (tensors.past_key, tensors.past_value)]
    expected = attention_body(torch, case.spec, tensors)
    kernels.attention(case.spec, tensors)()
    kernels.synchronize()
    attention = on_host(torch, tensors.attention)
    real = positions[:, -case.new :] >= 0
    errors, problem = [relative_error(attention[real], expected[0][real])], ""
    if np.asarray(attention[~real], np.float32).any():
        problem = "rows of padding are not zeros"
    written = written_slots(case, positions)
    caches = (on_host(torch, cache) for cache in (tensors.past_key, tensors.past_value))
    for cache, old, new in zip(caches, before, expected[1:], strict=True):
        errors.append(relative_error(cache.swapaxes(1, 2)[written], new.swapaxes(1, 2)[written]))
        if not np.array_equal(bits(cache.swapaxes(1, 2)[~written]), bits(old.swapaxes(1, 2)[~written])):
            problem = "slots were written that no new token has"
    return max(errors, key=lambda error: np.inf if np.isnan(error) else error), problem


def written_slots(case: AttentionCase, positions: np.ndarray) -> np.ndarray:
    """Which slots of the cache a call writes, bool [B,M]: of new tokens, in a chunked layer those of the last chunk."""
    written, chunk = np.zeros((len(positions), case.slots), bool), case.spec.chunk_size
    for row, new in zip(written, positions[:, -case.new :], strict=True):
        real = new[new >= 0]
        if chunk and len(real):
            real = real[real >= real.max() // chunk * chunk] % chunk
        row[real] = True
    return written


def bits(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, which compare as they are where numbers may be NaN."""
    return np.ascontiguousarray(array).view(np.uint8)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """``|actual - expected| / |expected|`` by the Euclidean norm; 0 where both are empty or zero."""
    actual, expected = (np.asarray(part, np.float64) for part in (actual, expected))
    difference, norm = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if norm == 0 and not np.isnan(difference):
        return 0.0 if difference == 0 else np.inf
    return float(difference / norm)


def failures(results: Iterable[Checked]) -> list[Checked]:
    """Those that did not pass."""
    return [result for result in results if not result.passed]


def as_figures(result: Checked) -> dict[str, Any]:
    """Columns of the table."""
    outcome = "" if not result.measured else "pass" if result.passed else "FAIL"
    errors = {"rel. error": result.error, "bound": result.bound}
    return {"cases": result.cases, **errors, "result": outcome, "worst case": result.worst}
