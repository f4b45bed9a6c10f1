"""Fuzz the parsers: ``python -m tests.fuzz.run --seconds 60``, or ``--runs 1000000 --results FILE.json``.

Each target runs in a child of one process (:mod:`tests.fuzz.one`) under libFuzzer's limits of time and memory for one
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

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
    seconds: int
    edges: int
    finding: str

    def row(self) -> str:
        """One line of a table."""
        rate = self.executions / self.seconds if self.seconds else 0
        return f"{self.target:18}{self.executions:>12,}{self.seconds:>9,} s{rate:>9,.0f}/s{self.edges:>8,} edges"


def fuzz(names: Sequence[str], seconds: int, runs: int, jobs: int, findings: Path) -> Iterator[Result]:
    """Fuzz some targets, ``jobs`` at a time.

    Args:
        names: The targets.
        seconds: For all of them together; 0: no limit.
        runs: Inputs a target; 0: no limit.
        jobs: How many at a time.
        findings: Folder for inputs that fail.
    """
    findings.mkdir(parents=True, exist_ok=True)
    each = max(1, seconds * jobs // len(names)) if seconds else 0
    with tempfile.TemporaryDirectory(prefix="l4fuzz-") as scratch:
        command = [sys.executable, "-m", "tests.fuzz.one", str(jobs)]
        env = {**os.environ, "TMPDIR": scratch}
        with subprocess.Popen(
            command,
            cwd=REPO,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for name in names:
                options = _options(name, Path(scratch) / name, each, runs, findings)
                request = {"target": name, "options": options, "log": str(Path(scratch) / name / "log")}
                process.stdin.write(json.dumps(request) + "\n")
            process.stdin.close()
            for line in process.stdout:
                name, code = json.loads(line)
                yield _result(name, code, (Path(scratch) / name / "log").read_text(errors="replace"))
    if process.returncode:
        raise RuntimeError(f"the fuzzing process ended with {process.returncode}")


def _options(name: str, scratch: Path, seconds: int, runs: int, findings: Path) -> list[str]:
    """libFuzzer's options for a target, whose seeds and dictionary are written to ``scratch``."""
    target = TARGETS[name]
    corpus = scratch / "corpus"
    corpus.mkdir(parents=True)
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    words = scratch / "words"
    words.write_text("\n".join(f'"{_escaped(word)}"' for word in target.words))
    return [
        str(corpus), f"-max_len={target.longest}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={RSS_MB}",
        f"-artifact_prefix={findings / name}-", "-print_final_stats=1", f"-max_total_time={seconds}",
        *([f"-dict={words}"] if target.words else []), *([f"-runs={runs}"] if runs else []),
    ]  # fmt: skip


def _result(name: str, code: int, log: str) -> Result:
    """What libFuzzer's log says: its last line of progress, or its final statistics."""
    counts = re.findall(r"number_of_executed_units:\s*(\d+)", log) or re.findall(r"^#(\d+)", log, re.MULTILINE) or ["0"]
    edges = re.findall(r"\bcov: (\d+)", log) or ["0"]
    seconds = re.findall(r"Done \d+ runs in (\d+) second", log) or ["0"]
    lines = [line for line in log.splitlines() if not line.startswith(("#", "INFO:", "WARNING:"))]
    finding = "" if code == 0 else f"exit code {code}\n" + "\n".join(lines)[-4000:]
    return Result(name, int(counts[-1]), int(seconds[-1]), int(edges[-1]), finding)


def _escaped(word: str | bytes) -> str:
    """A word as libFuzzer's dictionaries spell it."""
    data = word.encode() if isinstance(word, str) else word
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--seconds", type=int, default=0, help="for all targets together")
    parser.add_argument("--runs", type=int, default=0, help="inputs a target")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--findings", type=Path, default=REPO / "build" / "fuzz", help="folder for inputs that fail")
    parser.add_argument("--results", type=Path, help="JSON file to add the results to")
    parser.add_argument("--show", type=Path, help="print the results of such a file as a table, and do nothing else")
    given = parser.parse_args(arguments)
    if given.show:
        print(_table(json.loads(given.show.read_text())["targets"].values()))  # noqa: T201
        return 0
    if not given.seconds and not given.runs:
        parser.error("give --seconds or --runs")
    failed = False
    for result in fuzz(given.targets or [*TARGETS], given.seconds, given.runs, given.jobs, given.findings):
        print(result.row(), flush=True)  # noqa: T201
        if result.finding:
            failed = True
            print(result.finding, flush=True)  # noqa: T201
        if given.results:
            _record(given.results, result)
    return int(failed)


def _table(results: Iterable[Mapping[str, Any]]) -> str:
    """The rows of a table in Markdown."""
    rows = ["| Target | Inputs tried | Seconds | Branches taken | Open findings |", "|---|---|---|---|---|"]
    for row in results:
        found = "1" if row["finding"] else "none"
        rows.append(f"| {row['target']} | {row['executions']:,} | {row['seconds']:,} | {row['edges']:,} | {found} |")
    return "\n".join(rows)


def _record(file: Path, result: Result) -> None:
    """Put a target's result in the place of its earlier one."""
    empty: dict[str, Any] = {"schema": "l4convert.fuzz/1", "targets": {}}
    content = json.loads(file.read_text()) if file.exists() else empty
    content["targets"][result.target] = asdict(result)
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
