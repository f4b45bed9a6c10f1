"""Everything that needs a GPU, on the one that is here: engines and ONNX Runtime's CUDA provider, checked and timed.

    python benchmarks/gpu.py [--work DIR] [--results DIR] [--tokens N] [--only TEXT] [--probe]

Each row converts the bundled nano model, builds an engine where the row is one, validates what came out against
transformers *through the GPU*, and times it: one sequence, PROMPT tokens in one step, then single tokens. Times are the
median of some repeats by the clock, from token ids in the host's memory to the logits of the last one there. The nano
model shows that everything runs and is right; with so small a model the times are those of launches and copies.

A row that this GPU cannot do says why. Exit code 0: every other row passed; 4: one did not; 5: there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gpu_hardware import Unfit, capability, hardware_for, slug

from l4convert.gpus import Gpu, find_gpus
from l4convert.runtime import EngineSession, OrtSession, Runner, RunWith
from l4convert.runtime.runner import last_logits

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "01_convert_nano_scout"
CONTEXT, BATCH, WINDOW = 1024, 3, 600
PROMPT, DECODED, REPEAT, WARM = 512, 64, 5, 3

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
    """

    gpu: Gpu
    work: Path
    tokens: int
    command: Command
    load: Callable[[RunWith, Path], Any]


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
        sizes = ["--max-batch", BATCH, "--max-context", CONTEXT, "--prefill-tokens", PROMPT]
        bench.command("build", out, "--target", hardware, *sizes)
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
    Row("cuda none", cuda("none")),
    Row("cuda int4", cuda("int4")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the artifacts (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON")
    parser.add_argument("--tokens", type=int, default=3000, help="held-out tokens to compare on")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows that have this in their name")
    parser.add_argument("--probe", action="store_true", help="only say which GPU there is")
    options = parser.parse_args(arguments)
    found = find_gpus()
    if not found.devices:
        print(f"error: {found.problem} on this machine; `make gpu` needs an NVIDIA GPU", file=sys.stderr)
        return 5
    gpu = found.devices[0]
    print(f"{gpu.name}, compute capability {gpu.compute_capability}, CUDA driver {found.driver}", flush=True)
    if options.probe:
        return 0
    rows = [row for row in ROWS if options.only in row.name]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(gpu, options.work or Path(folder), options.tokens, l4convert, load)
        results = [measured(row, bench) for row in rows]
    print("\n" + table(results))
    file = options.results / f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}-gpu-{slug(gpu.name)}.json"
    file.write_text(json.dumps(content(gpu, found.driver, options.tokens, results), indent=2) + "\n")
    print(f"\n{file}")
    return 0 if results and all(result.passed for result in results) else 4


def measured(row: Row, bench: Bench) -> Result:
    """Run a row; whatever goes wrong in it is its own problem and not that of the others."""
    print(f"... {row.name}", flush=True)
    if capability(bench.gpu) < row.least:
        least = ".".join(map(str, row.least))
        return Result(row.name, True, problem=f"skipped: needs compute capability {least}")
    try:
        figures = row.run(bench)
    except Unfit as reason:
        return Result(row.name, True, problem=f"skipped: {reason}")
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


def table(results: Sequence[Result]) -> str:
    """Rows as Markdown; a column for every figure that some row has."""
    columns = list(dict.fromkeys(key for result in results for key in result.figures))
    lines = [["row", *columns], ["---"] * (1 + len(columns))]
    for result in results:
        if result.problem is not None:
            lines.append([result.row, result.problem, *[""] * (len(columns) - 1)])
        else:
            lines.append([result.row, *(shown(result.figures.get(column, "")) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1 else f"{value:,.5g}"


def content(gpu: Gpu, driver: str | None, tokens: int, results: Sequence[Result]) -> dict[str, Any]:
    """The JSON: the device, the versions and every row."""
    from l4convert.cli._doctor_gpu import gpu_report

    return {
        "schema": "l4convert.gpu/1",
        "device": asdict(gpu),
        "driver": driver,
        "libraries": gpu_report()["libraries"],
        "tokens": tokens,
        "prompt": PROMPT,
        "rows": [asdict(result) for result in results],
    }


def l4convert(*arguments: object, accept: Sequence[int] = (0,)) -> Any:
    """Run a command of l4convert; give the JSON that it prints.

    Raises:
        Failed: It ended with another exit code; with the error that it printed.
    """
    command = [sys.executable, "-m", "l4convert", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")] or [done.stderr[-200:]]
        raise Failed(f"l4convert {arguments[0]} ended with {done.returncode}: {errors[0]}")
    return json.loads(done.stdout)


def load(run_with: RunWith, out: Path) -> OrtSession | EngineSession:
    return run_with.open(out, max_length=CONTEXT)


if __name__ == "__main__":
    sys.exit(main())
