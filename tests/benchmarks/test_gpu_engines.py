"""The rows of engines and of ONNX Runtime's CUDA provider, with everything that needs a GPU replaced."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from l4convert.gpus import Gpu
from l4convert.runtime import RunWith
from l4convert.targets.hardware import load_hardware
from tests.benchmarks.scripts import load

gpu = load("gpu_engines")

RTX = Gpu(0, "NVIDIA GeForce RTX 5090", "12.0", 34_000_000_000)
REPORT = {
    "passed": True,
    "rows": [
        {"passed": True, "reference": {"max_rel_logit": 0.01, "mean_kl": 1e-5, "top1": 0.99}},
        {"passed": True, "reference": {"max_rel_logit": 0.03, "mean_kl": 2e-5, "top1": 0.98}},
    ],
}


class Stub:
    """A runner that takes a time that the test chooses, by a clock of its own."""

    def __init__(self, step: float, token: float) -> None:
        self.now, self.step_seconds, self.token_seconds = 0.0, step, token
        self.config = SimpleNamespace(vocab_size=100)
        self.widths: list[int] = []

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def start(self, batch: int) -> Stub:
        assert batch == 1
        return self

    def step(self, ids: np.ndarray) -> np.ndarray:
        assert ids.max() < 100
        self.widths.append(ids.shape[1])
        self.now += self.step_seconds if ids.shape[1] > 1 else self.token_seconds
        return np.zeros((*ids.shape, 100), np.float32)


def bench(work: Path, device: Gpu = RTX, **replies: Any) -> tuple[Any, list[list[str]]]:
    """A bench whose commands are noted; ``replies``: what they give, or raise."""
    said: list[list[str]] = []

    def command(*arguments: object, accept: tuple[int, ...] = (0,)) -> Any:
        said.append([str(argument) for argument in arguments])
        reply = replies.get(str(arguments[0]), {})
        if isinstance(reply, Exception):
            raise reply
        return reply

    def library(sm: int, head_dim: int) -> Path:
        reply = replies.get("library", Path(f"library for SM {sm}, heads of {head_dim}"))
        if isinstance(reply, Exception):
            raise reply
        return reply

    return gpu.Bench(device, work, 100, command, lambda run_with, out: Stub(0.1, 0.01), library), said


@pytest.fixture
def with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name == "tensorrt" or None)


@pytest.mark.usefixtures("with_tensorrt")
def test_every_row_converts_builds_validates_and_is_timed(tmp_path: Path) -> None:
    here, said = bench(tmp_path, validate=REPORT)
    results = [gpu.measured(row, here) for row in gpu.ROWS]
    assert [result.row for result in results] == [
        "tensorrt-rtx none",
        "tensorrt-rtx int4",
        "tensorrt-rtx fp8",
        "tensorrt none",
        "tensorrt int4",
        "tensorrt fp8",
        "cuda none",
        "cuda int4",
    ]
    assert all(result.passed and result.problem is None for result in results)
    assert [command[0] for command in said] == ["convert", "build", "validate"] * 6 + ["convert", "validate"] * 2
    plugged = next(command for command in said if command[:2] == ["build", str(tmp_path / "tensorrt-int4")])
    assert plugged[plugged.index("--plugins") + 1] == "library for SM 120, heads of 32"
    assert said[1][:4] == ["build", str(tmp_path / "tensorrt-rtx-none"), "--target", "rtx-5090"]
    assert said[2][-2:] == ["--engine", "rtx-5090"]
    assert said[-1][-2:] == ["--provider", "cuda"]
    figures = results[0].figures
    assert (figures["parity"], figures["splits"], figures["max rel logit"]) == ("pass", "2/2", 0.03)


def test_the_times_are_medians_after_warming_up() -> None:
    stub = Stub(0.1, 0.01)
    figures = gpu.timed(stub, 100, clock=lambda: stub.now)
    assert figures == {"decode tokens/s": 100.0, "prefill tokens/s": 5120.0}
    assert stub.widths == [512] * 8 + [1] * 67


def test_what_the_gpu_cannot_do_is_skipped_and_passes(tmp_path: Path) -> None:
    by_name = {row.name: row for row in gpu.ROWS}
    ampere, said = bench(tmp_path, Gpu(0, "NVIDIA A100-SXM4-80GB", "8.0", 85_000_000_000), validate=REPORT)
    result = gpu.measured(by_name["tensorrt-rtx fp8"], ampere)
    assert (result.passed, result.problem) == (True, "not measured: needs compute capability 8.9")
    hopper, _ = bench(tmp_path, Gpu(0, "NVIDIA H100 80GB HBM3", "9.0", 85_000_000_000), validate=REPORT)
    result = gpu.measured(by_name["tensorrt-rtx int4"], hopper)
    assert result.passed
    assert result.problem == "not measured: tensorrt-rtx has no engines for compute capability 9.0"
    assert said == []


def test_a_row_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    here, _ = bench(tmp_path, build=gpu.Failed("l4convert build ended with 3"), validate={**REPORT, "passed": False})
    first, *_, last = [gpu.measured(row, here) for row in gpu.ROWS]
    assert (first.passed, first.problem) == (False, "failed: Failed: l4convert build ended with 3")
    assert not last.passed
    assert last.figures["parity"] == "FAIL"


def test_the_profile_is_that_of_the_gpu_s_name(tmp_path: Path) -> None:
    def profile(name: str, capability: str) -> str:
        return str(gpu.hardware_for(Gpu(0, name, capability, 24_000_000_000), "tensorrt-rtx", tmp_path))

    assert profile("NVIDIA GeForce RTX 4090", "8.9") == "rtx-4090"
    assert profile("NVIDIA L4", "8.9") == "l4"
    assert profile("NVIDIA L40S", "8.9") == "l40s"
    assert profile("NVIDIA RTX 4000 SFF Ada Generation", "8.9") in {"l4", "l40s", "rtx-4090"}
    made = load_hardware(profile("NVIDIA GeForce RTX 3090", "8.6"))
    assert (made.name, made.compute_capability, made.runtimes) == ("geforce-rtx-3090", "8.6", ("tensorrt-rtx",))
    assert made.memory_bytes == 24_000_000_000
    assert "fp8" not in made.precisions
    assert "fp8" in load_hardware(profile("NVIDIA Rubin", "13.0")).precisions


def test_the_table_has_every_row(tmp_path: Path) -> None:
    here, _ = bench(tmp_path, validate=REPORT, build=gpu.Unfit("tensorrt-rtx is not installed"))
    rows = [row for row in gpu.ROWS if row.name in {"tensorrt-rtx fp8", "cuda none", "cuda int4"}]
    text = gpu.section([gpu.measured(row, here) for row in rows]).markdown()
    header, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [header.count("|")] * 3
    assert [line.split(" | ")[1] for line in lines] == [
        "not measured: tensorrt-rtx is not installed",
        "pass",
        "pass",
    ]


def test_a_command_s_error_is_the_row_s(tmp_path: Path) -> None:
    with pytest.raises(gpu.Failed, match=r"l4convert validate ended with 3: error: .*nowhere"):
        gpu.l4convert("validate", tmp_path / "nowhere", "--reference", tmp_path)
    assert isinstance(gpu.l4convert("targets"), dict)


def test_a_backend_that_is_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = SimpleNamespace(returncode=5, stdout="", stderr="error: tensorrt_rtx is not installed: pip install x\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **options: reply)
    with pytest.raises(gpu.Unfit, match=r"^tensorrt_rtx is not installed: pip install x$"):
        gpu.l4convert("build", "out")


def test_an_artifact_is_opened_for_the_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(RunWith, "open", lambda self, out, **options: seen.update(options, out=out))
    gpu.load(RunWith(engine="l4"), tmp_path)
    assert seen == {"max_length": 1024, "out": tmp_path}


@pytest.mark.usefixtures("with_tensorrt")
@pytest.mark.parametrize(("failed", "problem"), [(False, "not measured: no triton"), (True, "failed: no triton")])
def test_a_plugin_library_that_cannot_be_built(tmp_path: Path, failed: bool, problem: str) -> None:
    here, said = bench(tmp_path, library=gpu.NotBuilt("no triton", failed))
    (row,) = [row for row in gpu.ROWS if row.name == "tensorrt int4"]
    result = gpu.measured(row, here)
    assert (result.passed, result.problem) == (not failed, problem)
    assert said == []


def test_without_tensorrt_its_rows_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    here, _ = bench(tmp_path)
    (row,) = [row for row in gpu.ROWS if row.name == "tensorrt fp8"]
    result = gpu.measured(row, here)
    assert result.passed
    assert result.problem.startswith("not measured: tensorrt is not installed: pip install tensorrt-cu13")
