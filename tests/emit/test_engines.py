"""Engines in a manifest: recorded one at a time by many writers, checked byte for byte, never followed elsewhere."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.emit import read_manifest, verify_artifact, write_artifact
from l4convert.emit.engines import engine_entries, forget_engine, record_engine
from l4convert.emit.manifest import encode_manifest
from l4convert.errors import InputError
from tests.emit.models import Weight, holder

PLAN = "engines/l4/decoder.plan"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(holder({"w": Weight(np.ones((8, 8), np.float32), "w")}), tmp_path / "out")


def _plan(out: Path, path: str = PLAN, content: bytes = b"plan") -> dict[str, Any]:
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    (out / path).write_bytes(content)
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "hardware": "l4"}


def _problems(out: Path) -> tuple[str, ...]:
    return verify_artifact(out).problems


def test_recorded_engines_verify_and_are_counted(artifact: Path) -> None:
    before = verify_artifact(artifact)
    record_engine(artifact, _plan(artifact))
    record_engine(artifact, _plan(artifact, "engines/a100/decoder.plan", b"another"))
    (artifact / "engines/l4/decoder.log").write_text("said")
    (artifact / "engines/l4/timing.cache").write_bytes(b"\0")
    report = verify_artifact(artifact)
    assert report.ok
    assert report.files == before.files + 2
    assert [entry["path"] for entry in engine_entries(read_manifest(artifact))] == [
        "engines/a100/decoder.plan",
        PLAN,
    ]
    assert sorted(path.name for path in (artifact / "engines").iterdir()) == ["a100", "l4"]  # no lock, no partial file


def test_an_entry_replaces_the_one_with_its_path_and_can_be_taken_out(artifact: Path) -> None:
    record_engine(artifact, _plan(artifact))
    record_engine(artifact, _plan(artifact, content=b"better"))
    assert [entry["bytes"] for entry in engine_entries(read_manifest(artifact))] == [6]
    manifest = read_manifest(artifact)
    forget_engine(artifact, PLAN)
    assert "engines" not in read_manifest(artifact)
    assert _problems(artifact) == (f"{PLAN}: not in the manifest",)
    record_engine(artifact, manifest["engines"][0])
    assert read_manifest(artifact) == manifest


def _record_many(out: str, number: int) -> None:
    for i in range(5):
        record_engine(Path(out), _plan(Path(out), f"engines/gpu{number}/part{i}.plan", b"x" * (i + 1)))


def test_writers_in_several_processes_lose_nothing(artifact: Path) -> None:
    (artifact / "engines").mkdir()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_record_many, args=(str(artifact), number)) for number in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(engine_entries(read_manifest(artifact))) == 15
    assert verify_artifact(artifact).ok


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda out: (out / PLAN).write_bytes(b"plam"), f"{PLAN}: its content is not what the manifest says"),
        (lambda out: (out / PLAN).write_bytes(b"plan and more"), f"{PLAN}: has 13 bytes, the manifest says 4"),
        (lambda out: (out / PLAN).unlink(), f"{PLAN}: is missing"),
        (lambda out: (out / "engines/l4/other.plan").touch(), "engines/l4/other.plan: not in the manifest"),
        (lambda out: (out / "engines/l4/.decoder.plan.partial").touch(), "partial: left by a build that was killed"),
        (lambda out: (out / "engines/stray").touch(), "engines/stray: is not a folder of engines"),
        (lambda out: (out / "engines/l4/deep").mkdir(), "engines/l4/deep: is not a file of an engine"),
        (lambda out: (out / "engines/l4/decoder.log").symlink_to("/etc/passwd"), "is not a file of an engine"),
    ],
)
def test_damage_is_named(artifact: Path, damage: Callable[[Path], object], problem: str) -> None:
    record_engine(artifact, _plan(artifact))
    damage(artifact)
    problems = _problems(artifact)
    assert len(problems) == 1
    assert problem in problems[0]


@pytest.mark.parametrize(
    "change",
    [
        {"path": "engines/../../secret.plan"},
        {"path": "/etc/x.plan"},
        {"path": "engines/l4/../l4/decoder.plan"},
        {"path": "engines/.hidden/decoder.plan"},
        {"path": "engines/l4/decoder.so"},
        {"path": 3},
        {"bytes": "4"},
        {"bytes": -1},
        {"sha256": None},
    ],
)
def test_malformed_entries_are_refused(artifact: Path, change: dict[str, Any]) -> None:
    manifest = read_manifest(artifact) | {"engines": [_plan(artifact) | change]}
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
    assert _problems(artifact) == (
        "l4convert.json: an entry of 'engines' is malformed or occurs twice",
        f"{PLAN}: not in the manifest",
    )


@pytest.mark.parametrize("engines", [7, {"a": 1}, "engines", [[]], [None]])
def test_a_manifest_with_something_else_there_is_no_crash(artifact: Path, engines: object) -> None:
    manifest = read_manifest(artifact) | {"engines": engines}
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
    assert _problems(artifact) == ("l4convert.json: an entry of 'engines' is malformed or occurs twice",)


@pytest.mark.parametrize("inside", ["engines", "engines/l4", PLAN])
def test_links_out_of_the_artifact_are_not_followed(artifact: Path, tmp_path: Path, inside: str) -> None:
    record_engine(artifact, _plan(artifact))
    outside = tmp_path / "outside"
    (artifact / inside).rename(outside)
    (artifact / inside).symlink_to(outside)
    problems = _problems(artifact)
    assert any(problem.startswith(inside) and "is not a" in problem for problem in problems)
    assert f"{PLAN}: is missing" in problems


def test_a_changed_manifest_is_not_made_good(artifact: Path) -> None:
    path = artifact / "l4convert.json"
    path.write_bytes(path.read_bytes().replace(b'"numpy"', b'"nunpy"'))
    entry = _plan(artifact)
    with pytest.raises(InputError, match="was changed after it was written"):
        record_engine(artifact, entry)
    assert any("was changed after" in problem for problem in _problems(artifact))
