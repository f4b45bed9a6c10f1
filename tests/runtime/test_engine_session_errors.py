"""What a session of engines refuses, and in which words."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from l4convert.errors import BackendMissing, DeviceError, InputError, UsageError
from l4convert.gpus import Gpu, Gpus
from l4convert.runtime import EngineSession
from tests.runtime.fake_device import BATCH, CONTEXT, GPU, FakeDevice, add_engines, gpus, opened


def test_limits(built: dict[str, Path]) -> None:
    with opened(built["whole"], max_length=10) as session:
        with pytest.raises(UsageError, match=r"4 sequences at once, .* rtx-4090 was built for 3"):
            session.start(BATCH + 1)
        with pytest.raises(ValueError, match="at least 1"):
            session.start(0)
        with pytest.raises(UsageError, match="needs 11 positions and the session has 10"):
            session.start(1).step(np.ones((1, 11), np.int64))
        with pytest.raises(InputError, match="token 128 is outside"):
            session.start(1).step(np.array([[128]]))
    for length in (0, CONTEXT + 1):
        with pytest.raises(UsageError, match=rf"not between 1 and the {CONTEXT} tokens"):
            opened(built["whole"], max_length=length)


def test_a_full_row_stops_its_batch_with_a_reason(built: dict[str, Path]) -> None:
    """Padding is written too, and there is no slot for it behind the last."""
    with opened(built["whole"]) as session:
        stream = session.start(2)
        mask = np.ones((2, CONTEXT), np.int64)
        mask[1, 5:] = 0
        stream.step(np.full((2, CONTEXT), 7), mask)
        with pytest.raises(UsageError, match=f"a sequence of the batch has all {CONTEXT} tokens"):
            stream.step(np.array([[7], [7]]), np.array([[0], [1]]))


def test_padding_stays_within_the_caches(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """One row has two slots left, within its chunk, and gets one token beside five: calls of two, then of one each."""
    context = CONTEXT - 2  # no multiple of the chunk
    artifact = add_engines(Path(shutil.copytree(artifacts["static"], tmp_path / "a")), max_context=context)
    device = FakeDevice()
    with opened(artifact, device) as session:
        stream = session.start(2)
        mask = np.ones((2, context - 2), np.int64)
        mask[1, 1:] = 0
        stream.step(np.full((2, context - 2), 7), mask)
        before = len(device.calls)
        stream.step(np.full((2, 5), 7), np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]))
    assert [shapes["input_ids"][1] for _, shapes in device.calls[before:]] == [2, 1, 1, 1]


def test_too_little_memory(built: dict[str, Path]) -> None:
    device = FakeDevice(free=1000)
    with pytest.raises(
        DeviceError, match=r"take 0\.00 GB beside the weights, and Fake RTX has 0\.00 GB free"
    ) as caught:
        opened(built["whole"], device)
    assert "--max-context" in (caught.value.hint or "")
    assert device.closed
    assert device.memory == {}


def test_no_gpu(built: dict[str, Path]) -> None:
    with pytest.raises(BackendMissing, match="no CUDA driver on this machine") as caught:
        EngineSession.open(built["whole"], gpus=lambda: Gpus(None, (), "no CUDA driver"))
    assert caught.value.exit_code == 5


def test_cuda_python_is_missing(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendMissing, match=r"^cuda is not installed: pip install cuda-bindings$"):
        EngineSession.open(built["whole"], gpus=gpus)


def test_another_gpu(built: dict[str, Path]) -> None:
    def other() -> Gpus:
        return Gpus("13.0", (Gpu(0, "H100", "9.0", 80 << 30),), None)

    pattern = r"engine is for rtx-4090 \(compute capability 8\.9\), and this GPU \(H100\) has compute capability 9\.0"
    for hardware in (None, "rtx-4090"):
        with pytest.raises(InputError, match=pattern):
            EngineSession.open(built["whole"], hardware=hardware, gpus=other)


def test_the_name_says_what_runs_where(built: dict[str, Path]) -> None:
    with opened(built["whole"], hardware="rtx-4090") as session:
        assert session.name == f"whole, TensorRT-RTX engine rtx-4090 on {GPU.name}"
