"""Free disk against need: the plan refuses exactly what the conversion refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from l4convert.errors import InputError
from l4convert.pipeline import ConvertOptions, PlanOptions, convert, plan_conversion
from l4convert.planning.disk import plan_disk


def limit(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))


def test_the_same_disk_is_too_small_for_plan_and_conversion(nano: Path, tmp_path: Path, monkeypatch):
    options = ConvertOptions(nano, tmp_path / "out")
    needed = plan_conversion(options).disk.needed
    limit(monkeypatch, needed - 7)
    disk = plan_conversion(options).disk
    assert (disk.missing, disk.free, disk.folder) == (7, needed - 7, tmp_path)
    for refuse in (disk.check, lambda: convert(options)):
        with pytest.raises(InputError, match=f"{needed} bytes are needed, {needed - 7} are free: 7 too few"):
            refuse()
    limit(monkeypatch, needed)
    disk = plan_conversion(options).disk
    disk.check()
    assert disk.missing == 0
    convert(options)


def test_what_an_interrupted_run_left_counts_as_free(tmp_path: Path, monkeypatch):
    limit(monkeypatch, 100)
    left = tmp_path / ".out.partial" / "artifact"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(1 << 20))
    assert plan_disk(1 << 20, tmp_path / "out").missing == 0
    assert plan_disk(1 << 20, tmp_path / "other").missing == (1 << 20) - 100


def test_without_an_output_nothing_is_refused(nano: Path, monkeypatch):
    limit(monkeypatch, 0)
    disk = plan_conversion(PlanOptions(nano)).disk
    disk.check()
    assert (disk.missing, disk.folder, disk.free) == (0, None, None)


def test_the_folder_is_the_nearest_that_exists(tmp_path: Path):
    assert plan_disk(1, tmp_path / "a" / "b" / "out").folder == tmp_path
