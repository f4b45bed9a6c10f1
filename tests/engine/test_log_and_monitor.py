"""What a builder says: facts out of its log, and progress that never goes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4convert.engine.log import BuildLog
from l4convert.engine.monitor import Steps


class _Task:
    def __init__(self) -> None:
        self.done = 0.0
        self.text = ""

    def advance(self, amount: float) -> None:
        assert amount > 0
        self.done += amount

    def update(self, description: str) -> None:
        self.text = description


def test_a_log_is_kept_and_read(tmp_path: Path) -> None:
    with BuildLog(tmp_path / "build.log") as log:
        log.add("ERROR", "[checkMacros] Cuda Runtime (cudaError 35: CUDA driver version is insufficient)")
        log.add("INFO", "Max Scratch Memory: 8192000 bytes")
        log.add("VERBOSE", "Layer: x Scratch Memory: 1 bytes")
        log.add("INFO", "Max Scratch Memory: 16 bytes")
        log.add("INFO", "Total Weights Memory: 295428 bytes")
        assert log.reason() == "no reason given"
        log.add("INTERNAL_ERROR", "first\n  of all")
        log.add("ERROR", "second")
    assert (log.scratch_bytes, log.weights_bytes) == ([8192000, 16], 295428)
    assert log.reason() == "first of all"
    assert (tmp_path / "build.log").read_text().splitlines()[-1] == "ERROR: second"


def test_nested_phases_are_one_number_that_grows() -> None:
    task = _Task()
    steps = Steps(task, "Building l4 decoder")
    steps.start("Building engine", None, 2)
    steps.start("Optimizing graph", "Building engine", 4)
    assert task.text == "Building l4 decoder: optimizing graph"
    steps.step("Optimizing graph", 1)
    assert task.done == pytest.approx(25)
    steps.step("Optimizing graph", 3)
    steps.finish("Optimizing graph")
    assert task.text == "Building l4 decoder: building engine"
    steps.step("Building engine", 0)
    assert task.done == pytest.approx(50)
    steps.start("Costs", "a phase that nobody began", 0)
    steps.step("unknown", 7)
    steps.step("Building engine", 1)
    assert task.done == pytest.approx(100)
