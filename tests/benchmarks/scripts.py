"""The scripts of benchmarks/, run as a user runs them or imported as they import each other."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"

# Scout's form, at a size that takes no time.
SMALL = (
    "hidden_size=64",
    "intermediate_size=64",
    "intermediate_size_mlp=96",
    "num_attention_heads=4",
    "num_key_value_heads=2",
    "head_dim=16",
    "num_local_experts=4",
)


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with this interpreter; the caller looks at the exit code."""
    path = os.pathsep.join([str(BENCHMARKS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def make_small(path: Path, *arguments: object) -> Path:
    """A small checkpoint: two layers of Scout unless said otherwise."""
    sizes = [part for size in SMALL for part in ("--set", size)]
    done = run_script("make_checkpoint.py", "--output", path, "--layers", 2, "--vocab", 128, *sizes, *arguments)
    assert done.returncode == 0, done.stderr
    return path


def load(name: str) -> ModuleType:
    """A module that the scripts share; they see each other because their folder is first on the path."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)
