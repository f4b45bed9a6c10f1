"""The estimate of time: an estimate, but of the right work."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert import pipeline
from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.prequantized import quantized_parts
from l4convert.pipeline import PlanOptions, plan_conversion
from l4convert.planning import estimate
from l4convert.planning.estimate import TimePlan, noise_like, sample_layers
from tests.checkpoint.llmcompressor.make import HERE
from tests.checkpoints import write_random_checkpoint
from tests.compressed import compress


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SECONDS", 0.1)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_all_parameters_are_in_the_work(target: str):
    plan = plan_conversion(PlanOptions(preset="scout", recipe="fp8", target=target), measure=True)
    assert plan.time is not None
    values = {work: n for work, n in plan.time.elements.items() if not work.endswith(" scales")}
    assert sum(values.values()) == plan.parameters
    assert plan.time.rates.keys() == plan.time.elements.keys()
    assert all(rate > 0 for rate in plan.time.rates.values())
    assert plan.time.weight_bytes == pytest.approx(plan.bytes, rel=1e-3)


def test_seconds_are_work_over_rates():
    work = {"none": 100, "int4": 30}, {"none": 50.0, "int4": 3.0}
    assert TimePlan(*work, jobs=1, weight_bytes=200, digest_rate=100.0).seconds == 2 + 10 + 4
    assert TimePlan(*work, jobs=2, weight_bytes=200, digest_rate=100.0).seconds == 8
    assert TimePlan(*work, jobs=64, weight_bytes=200, digest_rate=100.0).seconds == 4  # one thread digests


@pytest.mark.parametrize("preset", ["scout", "maverick"])
def test_the_estimate_is_of_the_whole_model(preset: str, monkeypatch):
    monkeypatch.setattr(estimate, "_rate", lambda *_args: 1e7)
    monkeypatch.setattr(estimate, "_digest_rate", lambda _budget: 1e9)
    plan = plan_conversion(PlanOptions(preset=preset, jobs=1), measure=True)
    assert plan.time is not None
    assert plan.time.seconds == pytest.approx(plan.parameters / 1e7 + 2 * plan.bytes / 1e9, rel=1e-3)


def test_nothing_is_left_and_no_weight_is_read(nano: Path, tmp_path: Path, monkeypatch):
    from l4convert.checkpoint import open_checkpoint

    for kind in {type(tensor) for tensor in open_checkpoint(nano).tensors.values()}:
        tile = kind.tile

        def checked(self, *args, tile=tile):
            assert self.nbytes < 1024, f"{self.name} was read"
            return tile(self, *args)

        monkeypatch.setattr(kind, "tile", checked)
    plan = plan_conversion(PlanOptions(nano, output=tmp_path / "out"), measure=True)
    assert plan.time is not None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_gives_a_plan_without_an_estimate(nano: Path, monkeypatch):
    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(estimate.os, "pwrite", full)
    assert plan_conversion(PlanOptions(nano), measure=True).time is None


def test_measuring_is_not_the_default(nano: Path, monkeypatch):
    monkeypatch.setattr(pipeline, "estimate_time", lambda *_args: pytest.fail("measured"))
    assert plan_conversion(PlanOptions(nano)).time is None


def test_one_layer_of_each_kind_is_sampled():
    assert sample_layers([False, True, False, True]) == [0, 1]
    assert sample_layers([True, True]) == [0]


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("nvfp4-pack-quantized", None),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "scale_dtype": "torch.uint8"}),
        ("int-quantized", {"num_bits": 4}),
        ("pack-quantized", {"num_bits": 4, "symmetric": False}),
    ],
)
def test_random_content_has_sound_codes_and_scales(form: str, weights: dict[str, Any] | None, tmp_path: Path):
    path = HERE / "nvfp4"
    if weights is not None:
        source = write_random_checkpoint(tmp_path / "source", num_hidden_layers=1, num_local_experts=1)
        path = compress(source, tmp_path / form, {"strategy": "group", "group_size": 32, **weights}, form=form)
    tensors = open_checkpoint(path).tensors.values()
    for tensor in (tensor for tensor in tensors if next(quantized_parts(tensor), None) is not None):
        assert np.isfinite(noise_like(tensor, tensor).numpy()).all()
