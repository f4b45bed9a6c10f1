"""Engines are measured by the same steps; on a fake device, for want of a GPU."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from l4convert.bench import ours
from l4convert.bench.sweep import Sweep
from l4convert.errors import UsageError
from l4convert.progress import NO_PROGRESS
from l4convert.runtime import EngineSession, RunWith, read_artifact
from tests.runtime.fake_device import FakeDevice, add_engines, gpus, opener


@pytest.fixture
def order(artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ours.Order:
    out = add_engines(Path(shutil.copytree(artifacts["static"], tmp_path / "scout")), cuts=(2,))
    fake = partial(EngineSession.open, gpus=gpus, open_device=opener(FakeDevice()))
    monkeypatch.setattr(RunWith.open, "__kwdefaults__", {**(RunWith.open.__kwdefaults__ or {}), "open_engine": fake})
    return ours.Order(out, RunWith(engine="rtx-4090"), None, Sweep(read_artifact(out).config, (16, 40), 4, False))


def test_an_engine_is_measured_without_what_it_does_not_tell(order: ours.Order) -> None:
    with NO_PROGRESS.task("") as task:
        curve = ours.measure(order, task)
    assert curve.name == "scout, TensorRT-RTX engine rtx-4090 on Fake RTX"
    assert [point.context for point in curve.points] == [16, 40]
    assert all(len(point.decode_ms) == 3 and point.prefill is not None for point in curve.points)
    assert all(point.cache_bytes is None and point.cache_used_bytes is None for point in curve.points)


def test_an_engine_s_caches_cannot_be_filled(order: ours.Order) -> None:
    synthetic = ours.Order(order.artifact, order.run_with, None, Sweep(order.plan.config, (16,), 4, True))
    with NO_PROGRESS.task("") as task, pytest.raises(UsageError, match="not of an engine"):
        ours.measure(synthetic, task)
