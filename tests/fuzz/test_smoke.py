from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutate_json
from tests.fuzz.run import REPO, fuzz
from tests.fuzz.targets import TARGETS

SECONDS = 60


def test_all_targets_for_a_minute(tmp_path: Path) -> None:
    """All parsers together; a finding shows its traceback, and the input that made it is in the folder."""
    pytest.importorskip("atheris", reason="has wheels for Linux on x86-64 only")
    results = list(fuzz([*TARGETS], SECONDS, 0, min(2, os.cpu_count() or 1), tmp_path))
    findings = [f"{result.target}: {result.finding}" for result in results if result.finding]
    assert not findings, "\n\n".join(findings)
    assert {result.target for result in results} == TARGETS.keys()
    assert all(result.executions > 10 for result in results), results


def test_seeds_are_taken() -> None:
    """What a run starts from is not refused at the first check, or it would find nothing behind it.

    In a process of its own, as runs are: the hub's target answers all requests of its process.
    """
    program = """
from l4convert.errors import L4Error
from tests.fuzz.target import check
from tests.fuzz.targets import TARGETS

def taken(target, seed):
    check(target.parse, seed)
    try:
        target.parse(seed)
    except L4Error:
        return False
    return True

for name, target in TARGETS.items():
    assert any([taken(target, seed) for seed in target.seeds()]), name
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_finding_ends_the_run(tmp_path: Path) -> None:
    """A parser that raises something else is told, with the input."""
    pytest.importorskip("atheris", reason="has wheels for Linux on x86-64 only")
    program = """
import sys, functools, atheris
from tests.fuzz.target import check
def parse(data):
    if data[:1] == b"!":
        raise KeyError("found")
atheris.Setup(sys.argv, functools.partial(check, parse))
atheris.Fuzz()
"""
    options = ["-runs=100000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "KeyError" in done.stdout + done.stderr
    (found,) = tmp_path.glob("crash-*")
    assert found.read_bytes()[:1] == b"!"


def test_mutations_of_json_stay_json() -> None:
    import json

    seed = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    changed = {mutate_json(lambda data, _: data, seed, 1000, number) for number in range(300)}
    assert len(changed) > 100
    for text in changed:
        json.loads(text.decode("utf-8", "surrogatepass"))
