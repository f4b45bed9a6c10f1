"""``make gpu`` as a whole: without a GPU, with nothing to measure with, and with parts that others test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from l4convert.gpus import Gpu, Gpus, find_gpus
from tests.benchmarks.scripts import BENCHMARKS, load, run_script

gpu = load("gpu")
kernels = load("gpu_kernels")
report = load("gpu_report")

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "9.0", 85_000_000_000)
NO_GPU = pytest.mark.skipif(bool(find_gpus().devices), reason="this machine has a GPU")


def part(passed: bool = True, measured: bool = True, **content: Any) -> Any:
    lines = [("some row", {"us": 12.5}), ("another", "not measured: needs 400 GB")]
    return kernels.Part((report.Section("Some", lines, note="a note"),), content, measured, passed)


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(gpu, "probe", lambda: Gpus("13.0", (H100,), None))
    return monkeypatch


@NO_GPU
@pytest.mark.parametrize("script", [["gpu.py"], ["gpu_environment.py", "--probe"]])
def test_without_a_gpu_one_line_and_exit_code_5(script: list[str]) -> None:
    done = run_script(*script)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.count("\n") == 1
    assert "on this machine; `make gpu` needs an NVIDIA GPU" in done.stderr


def test_the_table_and_the_json(tmp_path: Path, on_an_h100: pytest.MonkeyPatch, capsys: Any) -> None:
    on_an_h100.setattr(gpu.gpu_kernels, "measure", lambda *arguments: part(limits={"rate": math.inf}))
    on_an_h100.setattr(gpu, "engines", lambda *arguments: part(rows=[]))
    assert gpu.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("## Some\na note\n\n| row | us |\n| --- | --- |\n| some row | 12.5 |\n") == 2
    (file,) = tmp_path.glob("*-gpu-h100-80gb-hbm3.json")
    content = json.loads(file.read_text())
    assert content["schema"] == "l4convert.gpu/2"
    assert content["device"]["compute_capability"] == "9.0"
    assert content["libraries"]["onnx"]
    assert content["problem"] is None
    assert content["kernels"] == {"limits": {"rate": None}}  # JSON has no infinity
    assert content["engines"] == {"rows": []}


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([part(), part()], 0),
        ([part(), part(passed=False)], 4),
        ([part(measured=False), part()], 0),
        ([part(measured=False), part(measured=False)], 5),
        ([part(measured=False, passed=False)], 4),
    ],
)
def test_exit_codes(parts: list[Any], code: int) -> None:
    assert gpu.exit_code(parts) == code


def test_a_torch_that_does_not_see_the_gpu_is_said_and_nothing_is_built(on_an_h100: pytest.MonkeyPatch) -> None:
    on_an_h100.setattr("torch.cuda.is_available", lambda: False)
    on_an_h100.setattr(kernels, "build_for", lambda sm: pytest.fail("built"))
    found = kernels.measure(H100, None, "", 0)
    assert (found.measured, found.passed) == (False, True)
    assert "it needs a build with CUDA" in found.sections[0].markdown()
    assert found.content["problem"].startswith("not measured: torch ")


@pytest.mark.parametrize("failed", [True, False])
def test_a_library_that_cannot_be_built_fails_unless_a_tool_is_missing(
    failed: bool, on_an_h100: pytest.MonkeyPatch
) -> None:
    def build_for(sm: int) -> Path:
        assert sm == 90
        raise kernels.NotBuilt("triton is not installed: pip install triton==3.6.0", failed)

    on_an_h100.setattr("torch.cuda.is_available", lambda: True)
    on_an_h100.setattr(kernels, "build_for", build_for)
    found = kernels.measure(H100, None, "", 0)
    assert (found.measured, found.passed) == (False, not failed)
    assert found.content["problem"].endswith("triton is not installed: pip install triton==3.6.0")


def test_the_committed_table_is_empty_and_says_why() -> None:
    file = BENCHMARKS / "results" / "2026-11-22-gpu-none.json"
    content = json.loads(file.read_text())
    assert content["schema"] == report.SCHEMA
    assert content["device"] is None
    assert "no GPU" in content["problem"]
    assert "kernels" not in content
