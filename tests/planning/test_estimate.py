"""The estimate of time: an estimate, but of the right work."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from l4convert import pipeline
from l4convert.pipeline import PlanOptions, plan_conversion
from l4convert.planning import estimate
from l4convert.planning.estimate import TimePlan, sample_layers


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
    assert plan.time.written_bytes == pytest.approx(plan.bytes, rel=1e-3)


def test_seconds_are_work_over_rates():
    work = {"none": 100, "int4": 30}, {"none": 50.0, "int4": 3.0}
    assert TimePlan(*work, jobs=1, written_bytes=200, digest_rate=100.0).seconds == 2 + 10 + 4
    assert TimePlan(*work, jobs=2, written_bytes=200, digest_rate=100.0).seconds == 8
    assert TimePlan(*work, jobs=64, written_bytes=200, digest_rate=100.0).seconds == 4  # one thread digests


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
