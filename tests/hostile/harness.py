"""Runs a case and says everything that is wrong with how it was refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Family

REPO = Path(__file__).resolve().parents[2]
SECONDS = 2.0
EXTRA_BYTES = 512 << 20


@dataclass(frozen=True)
class Outcome:
    """How a command ended; ``seconds`` is wall time, or processor time where another process had the processor."""

    code: int | None
    seconds: float
    memory: int
    events: tuple[str, ...]
    stdout: str = ""
    stderr: str = ""


Runner = Callable[[Sequence[str], Path], Outcome]


class WarmProcess:
    """The warm process of :mod:`tests.hostile.server`; call it with arguments and the case's folder."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.server"],
            cwd=REPO,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, argv: Sequence[str], room: Path) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "room": str(room)}) + "\n")
        self._process.stdin.flush()
        reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        seconds = min(reply["wall"], reply["cpu"])
        return Outcome(reply["code"], seconds, reply["memory"], tuple(reply["events"]), *_output(room))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def run_process(argv: Sequence[str], room: Path) -> Outcome:
    """The same by the real command; only its exit code and output count."""
    with (room / "stdout").open("w") as stdout, (room / "stderr").open("w") as stderr:
        command = [sys.executable, "-m", "l4convert", *argv]
        env = {**environment(), "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=room / "work", env=env, stdout=stdout, stderr=stderr, check=False)
    return Outcome(done.returncode, 0, 0, (), *_output(room))


def environment() -> dict[str, str]:
    """That of this process, without what would change how the command behaves."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("L4CONVERT_", "PYTEST_", "HF_"))}


def _output(room: Path) -> tuple[str, str]:
    return tuple((room / name).read_text(errors="replace") for name in ("stdout", "stderr"))  # type: ignore[return-value]


def prepare(family: Family, source: Path, room: Path) -> None:
    """Lay out a case's folder: the input, where the output goes, and a folder that nothing may open."""
    for name in ("output", "outside", "work"):
        (room / name).mkdir(parents=True)
    shutil.copytree(source, room / "input", symlinks=True)
    (room / "outside" / "secret").write_text("not for artifacts")


def arguments(family: Family, room: Path) -> list[str]:
    """The family's command for this folder."""
    places = {"input": room / "input", "out": room / "output" / "result", "room": room}
    return [part.format(**places) for part in family.command]


def problems(case: Case, family: Family, room: Path, run: Runner) -> list[str]:
    """Damage the input, run the command, and tell what is not as it must be; nothing: the case is refused well."""
    case.damage(room / "input")
    before = _snapshot(room)
    outcome = run(arguments(family, room), room)
    wanted = replace(case, exit_code=family.exit_code if case.exit_code is None else case.exit_code)
    found = _wrong_use(outcome)
    if wanted.exit_code:
        found += [*_wrong_text(wanted, outcome), *_left(room, before)]
    elif outcome.code:
        found.append(f"exit code {outcome.code}, not 0")
    return [*found, f"stderr: {outcome.stderr[:600]}", f"stdout: {outcome.stdout[:200]}"] if found else []


def _wrong_text(case: Case, outcome: Outcome) -> list[str]:
    lines = outcome.stderr.splitlines()
    found = [] if outcome.code == case.exit_code else [f"exit code {outcome.code}, not {case.exit_code}"]
    if not lines or not lines[0].startswith("error: ") or len(lines) > 2 or (lines[1:] and lines[1][:6] != "hint: "):
        found.append(f"{len(lines)} lines on stderr, not an error and perhaps a hint")
    if not all(line.isprintable() and len(line) < 900 for line in lines):
        found.append("a line is not printable, or endless")
    said = outcome.stderr + outcome.stdout  # `verify` lists all that it finds as its result
    if "Traceback" in said:
        found.append("a traceback")
    return found + [f"does not name {name!r}" for name in case.names if name not in said]


def _wrong_use(outcome: Outcome) -> list[str]:
    found = [f"caused {event}" for event in outcome.events]
    if outcome.seconds >= SECONDS:
        found.append(f"took {outcome.seconds:.1f} s")
    if outcome.memory >= EXTRA_BYTES:
        found.append(f"took {outcome.memory >> 20} MiB")
    return found


def _left(room: Path, before: dict[str, tuple[int, ...]]) -> list[str]:
    after = _snapshot(room)
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [f"left or changed {name}" for name in sorted(changed)[:5]]


def _snapshot(room: Path) -> dict[str, tuple[int, ...]]:
    """Everything in a case's folder, but for what the command printed: size, time of change, mode."""
    found = {}
    for folder, folders, files in os.walk(room):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            size = 0 if path.is_dir() else status.st_size
            found[str(path.relative_to(room))] = (size, 0 if path.is_dir() else status.st_mtime_ns, status.st_mode)
    return {name: value for name, value in found.items() if name not in {"stdout", "stderr"}}
