"""``--engine`` and ``--provider`` of generate and validate, and what doctor says of GPUs: on a machine without one."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from l4convert import cli
from l4convert.cli import _doctor_gpu
from l4convert.cli._doctor_gpu import gpu_lines, gpu_report, plugin_report, plugin_text
from l4convert.errors import BackendMissing, UsageError
from l4convert.gpus import Gpu, Gpus
from l4convert.plugins.library.native import DEFAULT_LIBRARY
from l4convert.runtime import EngineSession, RunWith
from l4convert.runtime.ort_values import copy_to, ort_value
from l4convert.runtime.providers import check_started, prepare
from tests.artifacts import write_canonical_artifact
from tests.checkpoints import write_random_checkpoint
from tests.runtime.byte_tokenizer import write_tokenizer
from tests.runtime.fake_device import CONTEXT, FakeDevice, add_engines, gpus, opener

H100 = Gpu(0, "NVIDIA H100", "9.0", 80_000_000_000)


@pytest.fixture(scope="module")
def no_gpu() -> None:
    from l4convert.gpus import find_gpus

    if find_gpus().devices:
        pytest.skip("this machine has a GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab_size=512)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With engines for one hardware profile, and a tokenizer."""
    out = write_canonical_artifact(checkpoint, tmp_path_factory.mktemp("running") / "scout", "static")
    write_tokenizer(out)
    return add_engines(out, cuts=(2,))


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Engines open on a fake device."""
    device = FakeDevice()
    fake = partial(EngineSession.open, gpus=gpus, open_device=opener(device))
    monkeypatch.setattr(RunWith.open, "__kwdefaults__", {**(RunWith.open.__kwdefaults__ or {}), "open_engine": fake})
    return device


def test_generate_with_an_engine_writes_the_text_of_the_cpu(
    artifact: Path, fake_gpu: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for options in ([], ["--engine", "rtx-4090"]):
        command = ["generate", str(artifact), "--prompt", "Some text", "--max-new-tokens", "12", "--json", *options]
        assert cli.run(command) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert [result["runner"] for result in results] == ["scout", "scout, TensorRT-RTX engine rtx-4090 on Fake RTX"]
    assert results[0]["remarks"] == []
    assert "decode steps are enqueued one by one" in results[1]["remarks"][0]
    assert fake_gpu.calls
    assert fake_gpu.closed


def test_a_text_longer_than_the_engine_s_context(
    artifact: Path, fake_gpu: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(artifact), "--prompt", "x" * 40, "--max-new-tokens", "9", "--engine", "rtx-4090"]
    assert cli.run(command) == 2
    assert f"the {CONTEXT} tokens that the engine for rtx-4090 was built for" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("cuts", "rows"), [((), 6), ((2,), 4)])
def test_validate_with_an_engine(
    cuts: tuple[int, ...],
    rows: int,
    checkpoint: Path,
    artifact: Path,
    fake_gpu: FakeDevice,
    tmp_path: Path,
    capsys: Any,
) -> None:
    """Every row of the table passes; padded batches are left out, with a note, where the engine takes one text."""
    copied = Path(shutil.copytree(artifact, tmp_path / "scout"))
    _forget_engines(copied)
    add_engines(copied, cuts=cuts, **({} if rows == 6 else {"max_batch": 1}))
    command = ["validate", str(copied), "--reference", str(checkpoint), "--tokens", "120", "--window", "40", "--json"]
    assert cli.run([*command, "--engine", "rtx-4090"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert len(report["rows"]) == rows
    assert any(note.startswith("Run by scout, TensorRT-RTX engine rtx-4090 on Fake RTX; ") for note in report["notes"])
    assert any("Padded batches were not compared" in note for note in report["notes"]) == (rows == 4)


@pytest.mark.usefixtures("fake_gpu")
def test_a_window_too_long_for_one_call_with_an_engine(
    checkpoint: Path, artifact: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has one stream at a time, so the other splits are those of the beginning."""
    copied = Path(shutil.copytree(artifact, tmp_path / "scout"))
    _forget_engines(copied)
    add_engines(copied)
    monkeypatch.setattr("l4convert.parity.steps.AT_ONCE", 25 * 512)
    command = ["validate", str(copied), "--reference", str(checkpoint), "--tokens", "120", "--window", "48", "--json"]
    assert cli.run([*command, "--engine", "rtx-4090", "--exact-angles"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in report["rows"]][:2] == ["steps", "odd splits"]
    assert [row["reference"]["tokens"] for row in report["rows"][:2]] == [120, 25]
    assert "angles in float64" in report["reference"]
    assert any("one stream at a time" in note for note in report["notes"])


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("options", [["--engine", "rtx-4090"], ["--provider", "cuda"]])
def test_without_a_gpu_the_exit_code_is_5(artifact: Path, options: list[str], capsys: Any) -> None:
    assert cli.run(["generate", str(artifact), "--prompt", "x", *options]) == 5
    error = capsys.readouterr().err
    assert "on this machine" in error
    assert "Traceback" not in error


def test_engine_and_provider_exclude_each_other(artifact: Path, capsys: Any) -> None:
    command = ["generate", str(artifact), "--prompt", "x", "--engine", "rtx-4090", "--provider", "cuda"]
    assert cli.run(command) == 2
    assert "exclude each other" in capsys.readouterr().err
    with pytest.raises(UsageError):
        RunWith("l4", "cpu")


def test_an_engine_that_is_not_there(artifact: Path, capsys: Any) -> None:
    assert cli.run(["generate", str(artifact), "--prompt", "x", "--engine", "h100"]) == 2
    error = capsys.readouterr().err
    assert "no engine for 'h100'; there is one for: rtx-4090 (compute capability 8.9)" in error
    assert "l4convert build" in error


def test_a_build_of_onnxruntime_without_cuda() -> None:
    module = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendMissing, match=r"without CUDAExecutionProvider: .*pip install onnxruntime-gpu"):
        prepare(module, "cuda", gpus)
    prepare(module, "cpu", gpus)


def test_the_libraries_of_cuda_are_loaded_where_there_is_a_gpu(capsys: Any) -> None:
    loaded: list[str] = []

    def preload() -> None:
        print("Failed to load libcudnn")  # noqa: T201  # as onnxruntime does
        loaded.append("cuda")

    module = SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"], preload_dlls=preload)
    prepare(module, "cuda", gpus)
    assert loaded == ["cuda"]
    assert capsys.readouterr().out == ""
    with pytest.raises(BackendMissing, match="no GPU on this machine"):
        prepare(module, "cuda", lambda: Gpus("13.0", (), "no GPU"))


def test_a_session_that_fell_back_to_the_cpu_is_refused() -> None:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    check_started(session, "cpu")
    with pytest.raises(BackendMissing, match=r"does not start, .*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        check_started(session, "cuda")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_caches_are_copied_to_a_provider_s_memory(dtype: Any) -> None:
    """Into the CPU's memory here: ONNX Runtime allocates, and values of any type, or none, are copied in."""
    content = np.arange(120).reshape(3, 2, 5, 4).astype(dtype)
    for part in (content, content[:, :, :0]):
        value = ort_value(np.ascontiguousarray(part))
        copied = copy_to(value, "cpu")
        assert (copied.shape(), copied.element_type()) == (list(part.shape), value.element_type())
        if dtype != ml_dtypes.bfloat16:  # which ONNX Runtime does not give back as an array
            np.testing.assert_array_equal(copied.numpy(), part)


def test_doctor_shows_gpus() -> None:
    rows = dict(gpu_lines(gpu_report(lambda: Gpus("13.0", (H100,), None))))
    assert rows["GPU 0"] == "NVIDIA H100, compute capability 9.0, 80.0 GB"
    assert rows["CUDA driver"] == "13.0"


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Gpus(None, (), "no CUDA driver"), "no GPU: no CUDA driver"),
        (Gpus("13.0", (), "no GPU"), "no GPU (CUDA driver 13.0)"),
    ],
)
def test_doctor_says_plainly_that_there_is_no_gpu(found: Gpus, text: str) -> None:
    assert dict(gpu_lines(gpu_report(lambda: found)))["GPU"] == text


def test_doctor_shows_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"tensorrt-rtx-cu12": "1.7", "cuda-bindings": "13.5.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise _doctor_gpu.PackageNotFoundError(name)

    monkeypatch.setattr(_doctor_gpu, "version", version)
    report = gpu_report(gpus)
    assert report["libraries"] == {"TensorRT-RTX": "1.7", "TensorRT": None, "cuda-python": "13.5.0"}
    assert dict(gpu_lines(report))["for engines"] == "TensorRT-RTX 1.7, TensorRT absent, cuda-python 13.5.0"


def test_doctor_shows_the_plugin_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plugin_text(plugin_report()) == "absent; l4convert plugins build makes it"
    path = tmp_path / DEFAULT_LIBRARY
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    assert "not a plugin library of l4convert" in plugin_text(plugin_report())
    found = {"path": "x.so", "version": "0.1.0", "sms": [80, 90], "problem": None}
    assert plugin_text(found) == "x.so, by l4convert 0.1.0, for SM 80, 90"


def _forget_engines(artifact: Path) -> None:
    from l4convert.emit import read_manifest
    from l4convert.emit.manifest import encode_manifest

    manifest = {key: value for key, value in read_manifest(artifact).items() if key != "engines"}
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
