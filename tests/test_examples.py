"""Every example's script runs as its README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_every_example_has_a_readme_and_a_script() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert (folder / "README.md").is_file()
        assert (folder / "run.py").is_file()


def test_nano_scout_ends_with_a_passing_parity_table(tmp_path: Path, nano: Path) -> None:
    script = nano.parent / "run.py"
    command = [sys.executable, str(script), "--output", str(tmp_path / "out"), "--tokens", "260"]
    run = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    parity, _, engines = run.stdout.partition("Parity with transformers")[2].partition("Engines built")
    table = parity.splitlines()
    rows = {line.split()[0]: line for line in table if line and line.split()[-1] in ("pass", "FAIL")}
    assert rows.keys() == {"none-cpu", "int4-cpu", "int4-static", "fp8-portable", "int4-rtx", "fp8-rtx"}
    assert all(line.endswith("pass") for line in rows.values()), run.stdout
    built = [line.split()[:3] for line in engines.splitlines() if line.endswith("pass")]
    sms = {(artifact, sm) for artifact, _, sm in built}
    assert sms == {
        ("int4-rtx", "8.0"),
        ("int4-rtx", "8.9"),
        ("int4-rtx", "12.0"),
        ("fp8-rtx", "8.9"),
        ("fp8-rtx", "12.0"),
    }
    bytes_of = {name: (tmp_path / "out" / name / "model.safetensors").stat().st_size for name in rows}
    assert bytes_of["int4-cpu"] < bytes_of["fp8-portable"] < bytes_of["none-cpu"]


def test_a_failing_step_fails_the_example(tmp_path: Path, nano: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "none-cpu").write_text("in the way")
    command = [sys.executable, str(nano.parent / "run.py"), "--output", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "none-cpu" in run.stderr


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_the_other_scripts_say_how_they_are_used(nano: Path, name: str) -> None:
    run = subprocess.run(
        [sys.executable, str(nano.parent / name), "--help"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()
