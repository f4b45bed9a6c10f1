"""Engines and ONNX Runtime's CUDA provider on the GPU: the whole nano model, checked and timed.

Each row converts the bundled nano model, builds an engine where the row is one, validates what came out against
transformers *through the GPU*, and times it: one sequence, PROMPT tokens in one step, then single tokens. Times are the
median of some repeats by the clock, from token ids in the host's memory to the logits of the last one there. The nano
model shows that everything runs and is right; with so small a model the times are those of launches and copies.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu_hardware import Unfit, capability, hardware_for
from gpu_library import NotBuilt
from gpu_report import Section

from l4convert.errors import INSTALL
from l4convert.gpus import Gpu
from l4convert.runtime import EngineSession, OrtSession, Runner, RunWith
from l4convert.runtime.runner import last_logits
from l4convert.targets.hardware import load_hardware

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "01_convert_nano_scout"
CONTEXT, BATCH, WINDOW = 1024, 3, 600
PROMPT, DECODED, REPEAT, WARM = 512, 64, 5, 3
SIZES = ("--max-batch", BATCH, "--max-context", CONTEXT, "--prefill-tokens", PROMPT)
HEAD_DIM = 32  # of the nano model
MISSING = 5  # exit code of the commands where a backend is not installed

Figures = dict[str, str | float]
Command = Callable[..., Any]


class Failed(Exception):
    """Why a row did not come to its end, in one line."""


@dataclass(frozen=True)
class Bench:
    """What rows run with.

    Attributes:
        gpu: The device; ``work``: a folder for artifacts; ``tokens``: of held-out text to validate on.
        command: Runs ``l4convert`` with arguments; gives the JSON that it prints.
        load: Opens an artifact.
        library: Builds the plugin library for an SM and heads of a width.
    """

    gpu: Gpu
    work: Path
    tokens: int
    command: Command
    load: Callable[[RunWith, Path], Any]
    library: Callable[[int, int], Path]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is measured.
        run: Measures it; gives column -> text or number. Raises :class:`Unfit` or :class:`Failed`.
        least: Lowest compute capability that can do it, as (major, minor).
    """

    name: str
    run: Callable[[Bench], Figures]
    least: tuple[int, int] = (7, 5)


@dataclass(frozen=True)
class Result:
    """What became of a row: ``figures`` where it ran, ``problem`` where it did not, ``passed`` where it should have."""

    row: str
    passed: bool
    figures: Figures = field(default_factory=dict)
    problem: str | None = None


def engine(recipe: str) -> Callable[[Bench], Figures]:
    """An engine of TensorRT-RTX, built here for this GPU."""

    def run(bench: Bench) -> Figures:
        hardware = hardware_for(bench.gpu, "tensorrt-rtx", bench.work)
        out = convert(bench, "tensorrt-rtx", recipe)
        bench.command("build", out, "--target", hardware, *SIZES)
        return check_and_time(bench, out, RunWith(engine=Path(hardware).stem))

    return run


def plugged(recipe: str) -> Callable[[Bench], Figures]:
    """An engine of TensorRT with the plugin library, both built here for this GPU."""

    def run(bench: Bench) -> Figures:
        if importlib.util.find_spec("tensorrt") is None:
            raise Unfit(f"tensorrt is not installed: {INSTALL['tensorrt']}")
        hardware = hardware_for(bench.gpu, "tensorrt", bench.work)
        library = bench.library(load_hardware(hardware).sm, HEAD_DIM)
        out = convert(bench, "tensorrt", recipe)
        bench.command("build", out, "--target", hardware, "--plugins", library, *SIZES)
        return check_and_time(bench, out, RunWith(engine=Path(hardware).stem))

    return run


def cuda(recipe: str) -> Callable[[Bench], Figures]:
    """ONNX Runtime with its CUDA provider."""

    def run(bench: Bench) -> Figures:
        return check_and_time(bench, convert(bench, "cuda", recipe), RunWith(provider="cuda"))

    return run


ROWS = (
    Row("tensorrt-rtx none", engine("none"), (8, 0)),
    Row("tensorrt-rtx int4", engine("int4"), (8, 0)),
    Row("tensorrt-rtx fp8", engine("fp8"), (8, 9)),
    Row("tensorrt none", plugged("none"), (8, 0)),
    Row("tensorrt int4", plugged("int4"), (8, 0)),
    Row("tensorrt fp8", plugged("fp8"), (8, 9)),
    Row("cuda none", cuda("none")),
    Row("cuda int4", cuda("int4")),
)


def measured(row: Row, bench: Bench) -> Result:
    """Run a row; whatever goes wrong in it is its own problem and not that of the others."""
    print(f"... {row.name}", flush=True)
    if capability(bench.gpu) < row.least:
        least = ".".join(map(str, row.least))
        return Result(row.name, True, problem=f"not measured: needs compute capability {least}")
    try:
        figures = row.run(bench)
    except (Unfit, NotBuilt) as reason:
        if isinstance(reason, NotBuilt) and reason.failed:
            return Result(row.name, False, problem=f"failed: {reason}")
        return Result(row.name, True, problem=f"not measured: {reason}")
    except Exception as error:  # the table is to have every row
        return Result(row.name, False, problem=f"failed: {type(error).__name__}: {' '.join(str(error).split())}")
    return Result(row.name, figures.get("parity") != "FAIL", figures)


def convert(bench: Bench, target: str, recipe: str) -> Path:
    """The artifact of the nano model for a target."""
    out = bench.work / f"{target}-{recipe}"
    bench.command(
        "convert", EXAMPLE / "checkpoint", "--output", out, "--target", target, "--recipe", recipe, "--overwrite"
    )
    return out


def check_and_time(bench: Bench, out: Path, run_with: RunWith) -> Figures:
    """Validate an artifact through the GPU, then time it."""
    how = ["--engine", run_with.engine] if run_with.engine is not None else ["--provider", "cuda"]
    text = ["--text", EXAMPLE / "heldout.txt", "--tokens", bench.tokens, "--window", WINDOW]
    report = bench.command("validate", out, "--reference", EXAMPLE / "checkpoint", *text, *how, accept=(0, 4))
    begun = time.perf_counter()
    with bench.load(run_with, out) as runner:
        loaded = time.perf_counter() - begun
        speed = timed(runner, runner.config.vocab_size)
        note = runner.graphs if isinstance(runner, EngineSession) else ""
    return {**parity_figures(report), **speed, "load s": round(loaded, 2), "note": note}


def parity_figures(report: dict[str, Any]) -> Figures:
    """The columns of a report of ``validate``; the largest difference is that of every way of feeding the text."""
    rows = report["rows"]
    whole = rows[0]["reference"]
    return {
        "parity": "pass" if report["passed"] else "FAIL",
        "splits": f"{sum(row['passed'] for row in rows)}/{len(rows)}",
        "max rel logit": max(row["reference"]["max_rel_logit"] for row in rows),
        "mean KL": whole["mean_kl"],
        "top-1": whole["top1"],
    }


def timed(runner: Runner, vocabulary: int, clock: Callable[[], float] = time.perf_counter) -> Figures:
    """Tokens a second of one sequence: a prompt in one step, and single tokens after it."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT + WARM + DECODED))
    prefill, decode = [], []
    for _ in range(WARM + REPEAT):
        stream, begun = runner.start(1), clock()
        last_logits(stream, ids[:, :PROMPT])
        prefill.append(clock() - begun)
    for at in range(PROMPT, ids.shape[1]):
        begun = clock()
        last_logits(stream, ids[:, at : at + 1])
        decode.append(clock() - begun)
    return {
        "decode tokens/s": round(1 / statistics.median(decode[WARM:]), 1),
        "prefill tokens/s": round(PROMPT / statistics.median(prefill[WARM:]), 1),
    }


def section(results: Sequence[Result]) -> Section:
    """Rows of the table; a column for every figure that some row has."""
    lines = [(result.row, result.figures if result.problem is None else result.problem) for result in results]
    note = f"Nano model; prompts of {PROMPT} tokens, then single ones."
    return Section("Engines and ONNX Runtime's CUDA provider", lines, note=note)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]


def l4convert(*arguments: object, accept: Sequence[int] = (0,)) -> Any:
    """Run a command of l4convert; give the JSON that it prints.

    Raises:
        Unfit: A backend is missing; with the command that installs it.
        Failed: It ended with another exit code; with the error that it printed.
    """
    command = [sys.executable, "-m", "l4convert", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")] or [done.stderr[-200:]]
        if done.returncode == MISSING:
            raise Unfit(errors[0].removeprefix("error: "))
        raise Failed(f"l4convert {arguments[0]} ended with {done.returncode}: {errors[0]}")
    return json.loads(done.stdout)


def load(run_with: RunWith, out: Path) -> OrtSession | EngineSession:
    return run_with.open(out, max_length=CONTEXT)
