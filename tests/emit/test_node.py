"""What a machine of a cluster does, and refuses; no cluster is needed for that."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l4convert.emit import node
from l4convert.emit.blocks import NoRoomError
from l4convert.emit.jobs import plan_jobs
from l4convert.emit.journal import Journal, Recorded, work_of
from l4convert.emit.node import Report, Run, versions, work_on
from l4convert.emit.plan import WeightsPlan, plan_weights
from l4convert.errors import BackendMissing, ClusterError, UsageError
from l4convert.quantization.fp8 import quantize_fp8
from tests.emit.models import Weight, holder

FACTS = {"recipe": "fp8"}


def _plan() -> WeightsPlan:
    rng = np.random.default_rng(5)
    tensors = {}
    for i in range(4):
        weight = Weight(rng.standard_normal((256, 64)).astype(np.float32), f"s{i}")
        tensors[f"v{i}"], tensors[f"s{i}"] = quantize_fp8(weight)
    plan = plan_weights(holder(dict(tensors)))
    return replace(plan, groups=tuple(tuple(replace(p, values=()) for p in group) for group in plan.groups))


PLAN = _plan()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that a driver has prepared."""
    weights, journal = tmp_path / "weights", tmp_path / "journal"
    weights.write_bytes(bytes(PLAN.total_bytes))
    Journal(journal, Recorded(FACTS), 4).close()
    return Run(os.urandom(8).hex(), weights, journal, work_of(journal), None)


def _work(
    run: Run, first: int = 0, stop: int = 4, recorded: dict[int, bytes] | None = None, processes: int = 1,
    plan: Callable[[], bytes] = lambda: pickle.dumps(PLAN),
) -> Report:  # fmt: skip
    return work_on(pickle.dumps(run), versions(), first, recorded or {}, stop, plan, lambda: processes)


def _bytes(first: int, stop: int) -> dict[int, bytes]:
    return {p.offset: p.compute() for job in plan_jobs(PLAN, first, stop) for p in job.pieces}


def test_jobs_are_cut_anywhere() -> None:
    whole = list(plan_jobs(PLAN))
    assert len(whole) == 4
    for first in range(5):
        for stop in range(first, 5):
            assert list(plan_jobs(PLAN, first, stop)) == whole[first:stop]


def test_its_jobs_are_written_and_no_others(run: Run) -> None:
    report = _work(run, 1, 3)
    assert (report.error, [done.index for done in report.done]) == (None, [1, 2])
    written = run.weights.read_bytes()
    for offset, data in _bytes(1, 3).items():
        assert written[offset : offset + len(data)] == data
    for offset, data in (_bytes(0, 1) | _bytes(3, 4)).items():
        assert written[offset : offset + len(data)] == bytes(len(data))


def test_recorded_jobs_are_verified(run: Run) -> None:
    recorded = {done.index: done.digest for done in _work(run).done}
    content = run.weights.read_bytes()
    offset = next(iter(_bytes(2, 3)))
    run.weights.write_bytes(content[:offset] + b"\x55" + content[offset + 1 :])
    report = _work(run, recorded=recorded)
    assert [done.resumed for done in report.done] == [True, True, False, True]
    assert run.weights.read_bytes() == content


def test_the_plan_is_asked_for_once_a_run(run: Run) -> None:
    asked: list[None] = []

    def plan() -> bytes:
        asked.append(None)
        return pickle.dumps(PLAN)

    for job in range(4):
        _work(run, job, job + 1, plan=plan)
    assert len(asked) == 1
    _work(replace(run, name="another"), plan=plan)
    assert len(asked) == 2


@pytest.mark.parametrize("missing", ["weights", "journal"])
def test_a_folder_that_is_not_shared(run: Run, missing: str) -> None:
    getattr(run, missing).unlink()
    report = _work(run)
    assert isinstance(report.error, ClusterError)
    assert str(run.journal.parent) in report.error.message
    assert report.error.message.endswith(f"No such file or directory (on {os.uname().nodename})")
    assert report.done == ()


def test_a_task_of_a_discarded_run_writes_nothing(run: Run) -> None:
    run.journal.unlink()
    Journal(run.journal, Recorded({"recipe": "int4"}), 4).close()
    report = _work(run)
    assert isinstance(report.error, ClusterError)
    assert "holds another run" in report.error.message
    assert run.weights.read_bytes() == bytes(PLAN.total_bytes)


def test_a_task_that_began_before_its_run_was_discarded_writes_the_old_file(run: Run) -> None:
    _work(run, 0, 1)
    run.journal.unlink()
    run.weights.unlink()
    run.weights.write_bytes(bytes(PLAN.total_bytes))
    assert _work(run, 1, 4).error is None
    assert run.weights.read_bytes() == bytes(PLAN.total_bytes)


def test_other_versions_are_refused_before_anything_is_unpacked() -> None:
    report = work_on(b"not a pickle", versions() | {"numpy": "1.0"}, 0, {}, 4, lambda: b"", lambda: 1)
    assert isinstance(report.error, BackendMissing)
    assert report.error.hint == "on that machine: pip install numpy==1.0"
    assert f"numpy {np.__version__}" in report.error.message


def test_a_full_disk_is_told_with_what_was_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, 0

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 5:  # two for each job
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    report = pickle.loads(pickle.dumps(_work(run)))
    assert isinstance(report.error, NoRoomError)
    assert (report.error.what, report.error.error.errno) == ("weights: tensor 's2'", errno.ENOSPC)
    assert [done.index for done in report.done] == [0, 1]


def test_the_processes_of_a_machine_share_its_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l4convert.emit.memory.resident_bytes", lambda: 100 << 20)
    assert _work(replace(run, memory_limit=800 << 20), processes=4).error is None
    report = _work(replace(run, name="another", memory_limit=800 << 20), processes=8)
    assert isinstance(report.error, UsageError)
    assert "a memory limit of 800M is too small" in report.error.message
    least = int(report.error.message.partition("the least is ")[2].partition("M")[0])
    assert 800 < least < 1200
    assert _work(replace(run, name="enough", memory_limit=least << 20), processes=8).error is None


@pytest.fixture(autouse=True)
def _no_leftovers() -> None:
    while node._workplaces:
        node._workplaces.pop().close()
