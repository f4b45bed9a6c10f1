"""Kill the real command line at random points, continue, and compare the result with an undisturbed run's bytes.

    python benchmarks/kills.py 20

Each row is one conversion: it is killed (SIGKILL) one to three times at random moments between its first byte and the
time that an undisturbed run takes, then run to its end. Exit 1 if any result differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
NANO = REPO / "examples" / "01_convert_nano_scout" / "checkpoint"


def command(checkpoint: Path, out: Path) -> list[str]:
    """The command line under test."""
    return [sys.executable, "-m", "l4convert", "convert", str(checkpoint), "--output", str(out), "--json"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def larger(folder: Path) -> Path:
    """A random checkpoint of about 270 million parameters, so that writing takes longer than starting."""
    sys.path.insert(0, str(REPO))
    from tests.checkpoints import write_random_checkpoint

    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_local_experts": 16,
        "num_hidden_layers": 2,
    }
    return write_random_checkpoint(folder / "checkpoint", **sizes)


def run_killed(checkpoint: Path, out: Path, moment: float) -> bool:
    """Start a conversion and kill it ``moment`` seconds after its staging folder appears; False: it was done before."""
    process = subprocess.Popen(command(checkpoint, out), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out.parent / f".{out.name}.partial" / "lock"
    while process.poll() is None and not journal.exists():
        time.sleep(0.002)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=20)
    parser.add_argument("--checkpoint", type=Path, help="default: a generated one; `nano` is the bundled one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        checkpoint = NANO if str(options.checkpoint) == "nano" else options.checkpoint or larger(folder)
        done = subprocess.run(command(checkpoint, folder / "whole"), cwd=REPO, check=True, capture_output=True)
        undisturbed = json.loads(done.stdout)
        expected = digests(folder / "whole")
        print(f"undisturbed: {undisturbed['seconds']:.2f} s, {undisturbed['bytes'] / 1e6:.1f} MB\n")
        print("run  kills  at, seconds           resumed MB  identical")
        failures = 0
        for number in range(options.runs):
            out = folder / "out"
            moments = [random.uniform(0, undisturbed["seconds"]) for _ in range(random.randint(1, 3))]  # noqa: S311
            killed = [moment for moment in moments if not out.exists() and run_killed(checkpoint, out, moment)]
            resumed = 0
            if not out.exists():  # a kill after the last rename leaves a whole artifact, and perhaps its lock
                done = subprocess.run(command(checkpoint, out), cwd=REPO, check=True, capture_output=True)
                resumed = json.loads(done.stdout)["resumed_bytes"]
            same = digests(out) == expected
            failures += not same
            when = ", ".join(f"{moment:.2f}" for moment in killed)
            print(
                f"{number:3}  {len(killed):5}  {when:20}  {resumed / 1e6:10.1f}  {'yes' if same else 'NO'}", flush=True
            )
            shutil.rmtree(out)
        print(f"\n{options.runs - failures} of {options.runs} identical")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
