"""Killed at random moments by SIGKILL, the real command line goes on and ends with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS = 6


def test_kills_at_random_moments(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), str(RUNS), "--json", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(rows.read_text())["rows"]
    assert len(results) == RUNS
    assert sum(len(row["killed"]) for row in results) >= RUNS // 2, "most runs ended before they were killed"
