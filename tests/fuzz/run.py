"""Fuzz the parsers: ``python -m tests.fuzz.run --seconds 60``, or ``--runs 1000000 --results FILE.json``.

Each target runs in a process of its own (:mod:`tests.fuzz.one`) under libFuzzer's limits of time and memory for one
input. The exit code is 1 where any target found something; the input that shows it stays in ``--findings``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.target import Target

REPO = Path(__file__).resolve().parents[2]
INPUT_SECONDS = 5
RSS_MB = 2048


@dataclass(frozen=True)
class Result:
    """How a target's run ended.

    Attributes:
        executions: Inputs that were tried; ``edges``: branches of instrumented code that some input took.
        finding: The last lines of what it printed, where it ended early; "" where it found nothing.
    """

    target: str
    executions: int
    seconds: float
    edges: int
    finding: str

    def row(self) -> str:
        """One line of a table."""
        rate = self.executions / self.seconds if self.seconds else 0
        return f"{self.target:18}{self.executions:>12,}{self.seconds:>9.0f} s{rate:>9,.0f}/s{self.edges:>8,} edges"


def fuzz(name: str, target: Target, seconds: int, runs: int, findings: Path) -> Result:
    """Fuzz one target for so many seconds or runs, whichever comes first; 0 is no limit."""
    with tempfile.TemporaryDirectory(prefix="l4fuzz-") as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for index, seed in enumerate(target.seeds()):
            (corpus / f"seed-{index}").write_bytes(seed)
        words = Path(scratch) / "words"
        words.write_text("\n".join(f'"{_escaped(word)}"' for word in target.words))
        options = [
            str(corpus), f"-dict={words}", f"-max_len={target.longest}", f"-timeout={INPUT_SECONDS}",
            f"-rss_limit_mb={RSS_MB}", f"-artifact_prefix={findings / name}-", "-print_final_stats=1", "-close_fd_mask=1",
            f"-max_total_time={seconds}", *([f"-runs={runs}"] if runs else []),
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.one", name, *options],
            cwd=REPO,
            env={**os.environ, "TMPDIR": scratch},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    return _result(name, done, time.monotonic() - start)


def _result(name: str, done: subprocess.CompletedProcess[str], seconds: float) -> Result:
    counts = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr) or re.findall(
        r"^#(\d+)", done.stderr, re.MULTILINE
    )
    edges = re.findall(r"\bcov: (\d+)", done.stderr)
    finding = "" if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-40:])
    return Result(name, int(counts[-1]) if counts else 0, seconds, int(edges[-1]) if edges else 0, finding)


def _escaped(word: str | bytes) -> str:
    """A word as libFuzzer's dictionaries spell it."""
    data = word.encode() if isinstance(word, str) else word
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in data)


def fuzz_all(names: Sequence[str], seconds: int, runs: int, jobs: int, findings: Path) -> Iterable[Result]:
    """Fuzz some targets, ``jobs`` at a time; ``seconds`` is for all of them together."""
    from tests.fuzz.targets import TARGETS

    findings.mkdir(parents=True, exist_ok=True)
    each = max(1, seconds * jobs // len(names)) if seconds else 0
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: fuzz(name, TARGETS[name], each, runs, findings), names)


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--seconds", type=int, default=0, help="for all targets together")
    parser.add_argument("--runs", type=int, default=0, help="inputs a target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--findings", type=Path, default=REPO / "build" / "fuzz", help="folder for inputs that fail")
    parser.add_argument("--results", type=Path, help="JSON file to add the results to")
    given = parser.parse_args(arguments)
    if not given.seconds and not given.runs:
        parser.error("give --seconds or --runs")
    failed = False
    for result in fuzz_all(given.targets or [*TARGETS], given.seconds, given.runs, given.jobs, given.findings):
        print(result.row(), flush=True)  # noqa: T201
        if result.finding:
            failed = True
            print(result.finding, flush=True)  # noqa: T201
        if given.results:
            _record(given.results, result)
    return int(failed)


def _record(file: Path, result: Result) -> None:
    """Put a target's result in the place of its earlier one."""
    content = json.loads(file.read_text()) if file.exists() else {"schema": "l4convert.fuzz/1", "targets": {}}
    content["targets"][result.target] = asdict(result)
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
