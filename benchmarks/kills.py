"""Kill the real command line at random points, continue, and compare the result with an undisturbed run's bytes.

    python benchmarks/kills.py 200 [--checkpoint DIR] [--seed N] [--json OUT.json]

Each row is one conversion: it is killed (SIGKILL) one to three times at random moments between the appearance of its
lock and the time that an undisturbed run takes, then run to its end. "resumed" is how much of the weights that last run
found finished and right. Exit 1 if any result differs; what differs is named, and kept.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One conversion: when it was killed, in seconds since its lock appeared, and how it ended."""

    killed: tuple[float, ...]
    resumed_bytes: int
    differs: tuple[str, ...]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, nargs="?", default=20)
    parser.add_argument("--checkpoint", type=Path, help="default: a generated one of 400 million parameters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    checkpoint = options.checkpoint or random_checkpoint(folder)
    done = convert(checkpoint, folder / "whole")
    expected = digests(folder / "whole")
    print(f"undisturbed: {done['seconds']:.2f} s, {done['bytes'] / 1e6:.1f} MB\n", flush=True)
    print("| run | killed at, seconds | resumed, MB | identical |\n|---|---|---|---|", flush=True)
    rows = []
    for number in range(options.runs):
        moments = [chance.uniform(0, done["seconds"]) for _ in range(chance.randint(1, 3))]
        row = disturbed(checkpoint, folder / f"out-{number}", moments, expected)
        rows.append(row)
        when = ", ".join(f"{moment:.2f}" for moment in row.killed) or "too late"
        same = f"NO: {', '.join(row.differs)}" if row.differs else "yes"
        print(f"| {number} | {when} | {row.resumed_bytes / 1e6:.1f} | {same} |", flush=True)
    bad = sum(bool(row.differs) for row in rows)
    kills, went_on = sum(len(row.killed) for row in rows), sum(row.resumed_bytes > 0 for row in rows)
    print(f"\n{kills} kills in {len(rows)} runs, {went_on} went on from finished blocks; {len(rows) - bad} identical")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "rows": [asdict(row) for row in rows]}, indent=1))
    if bad:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if bad else 0


def random_checkpoint(folder: Path) -> Path:
    """One of about 400 million parameters, so that writing takes longer than starting."""
    sys.path.insert(0, str(REPO))
    from tests.checkpoints import write_random_checkpoint

    return write_random_checkpoint(
        folder / "checkpoint",
        hidden_size=1024,
        intermediate_size=2048,
        num_local_experts=16,
        num_hidden_layers=3,
    )


def disturbed(checkpoint: Path, out: Path, moments: list[float], expected: dict[str, str]) -> Row:
    """Convert, killed at each moment, then undisturbed; removes the result if it is as ``expected``."""
    killed = [moment for moment in moments if not out.exists() and is_killed(checkpoint, out, moment)]
    # A kill after the last rename leaves a whole artifact.
    resumed = 0 if out.exists() else convert(checkpoint, out)["resumed_bytes"]
    found = digests(out)
    differs = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if not differs:
        shutil.rmtree(out)
        shutil.rmtree(room_of(out), ignore_errors=True)
    return Row(tuple(killed), resumed, tuple(differs))


def is_killed(checkpoint: Path, out: Path, moment: float) -> bool:
    """Kill a conversion ``moment`` seconds after its staging folder appears; False: it was done before."""
    process = subprocess.Popen(command(checkpoint, out), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (room_of(out) / "lock").exists():
        time.sleep(0.002)
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def convert(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Run it to its end; what it says."""
    done = subprocess.run(command(checkpoint, out), cwd=REPO, check=True, stdout=subprocess.PIPE)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def command(checkpoint: Path, out: Path) -> list[str]:
    """The command line under test."""
    return [sys.executable, "-m", "l4convert", "convert", str(checkpoint), "--output", str(out), "--json"]


def room_of(out: Path) -> Path:
    """Where an unfinished run keeps its work."""
    return out.parent / f".{out.name}.partial"


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
