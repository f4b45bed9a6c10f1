"""Speed and memory of whole conversions, beside copying the same bytes and other projects' quantizers.

    python benchmarks/convert.py --preset scout --layers 1 --vocab 4096 --scratch DIR [--json OUT.json]
    python benchmarks/convert.py --checkpoint DIR --skip llama.cpp --skip cold

Rows, all of one run on one checkpoint, best of ``--repeat`` rounds:

- ``cp`` of the weight files; with fsync; from a cold cache also reading them, which is all that the disk can do;
- ``l4convert convert`` as a process of its own, from the start of Python to the end of its last fsync;
- llama.cpp: its converter from the checkpoint to a BF16 GGUF file, and its quantizer from that to 4 bits, of which only
  the work is timed, not the start of Python and imports (``peer_llama.py`` says what exactly runs);
- ONNX Runtime's quantizer on a sample of the matrices, from float32 in memory to 4 bits in memory, likewise
  (``peer_onnxruntime.py``).

Warm: the files read are in the page cache before each run. Cold: they are not, which is checked. Peak RSS is the
largest the kernel saw, mapped files included; "anonymous" is without them. What cannot be measured has a row that says
why. Ratios are rates of parameters over those of a cold ``read`` and of ``cp`` in the same state of the cache, of
llama.cpp's two steps together, and of ONNX Runtime; where there are several of a kind, over the fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_environment import REQUIREMENTS
from measuring import Run, Unavailable, evict, remove, run, size_of, warm
from table import Row, as_json, markdown, with_sums
from workloads import (
    BLOCK_SIZES,
    COLD,
    COPY,
    HERE,
    LLAMA,
    ORT,
    OURS,
    SCALES,
    WARM,
    Source,
    Workload,
    open_source,
    require_room,
    workloads,
)

BYTES = 2  # a parameter in BF16


def main() -> int:
    options = parse_options()
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="l4convert-benchmark-", dir=options.scratch) as folder:
        scratch = Path(folder)
        try:
            source = open_source(options.checkpoint or make_checkpoint(options, scratch / "checkpoint"))
            require_room(options, source, scratch)
        except Unavailable as error:
            print(f"error: {error}", file=sys.stderr)
            return 3
        described = machine()
        print(f"{source.parameters:,} parameters, {source.bytes / 1e9:.3f} GB in {len(source.files)} file(s); "
              f"{described['cpu']}, {described['cores']} cores, {described['memory_bytes'] / 1e9:.0f} GB, "
              f"load {described['load']:.2f} before the start\n", flush=True)  # fmt: skip
        rows = with_sums(measure_all(list(workloads(options, source, scratch)), source, options.repeat))
    print(markdown(rows))
    if options.json:
        options.json.write_text(json.dumps(result(options, source, rows, described), indent=2) + "\n")
    failed = [row for row in rows if row.group == OURS and row.missing and not row.missing.startswith("skipped")]
    return 1 if failed else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="one that exists; else one is made, and removed")
    parser.add_argument("--preset", default="scout", help="of the one to make (make_checkpoint.py)")
    parser.add_argument("--layers", default="1", help="likewise")
    parser.add_argument("--vocab", default="4096", help="likewise")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                        help="a folder on the disk to measure, with room for three checkpoints")  # fmt: skip
    parser.add_argument("--skip", action="append", default=[], choices=[COPY, LLAMA, ORT, WARM, COLD])
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp's quantizer")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=SCALES, help="scale rules of our conversions")
    parser.add_argument("--llama-types", nargs="+", choices=["Q4_0", "Q4_K_S"], default=["Q4_0"],
                        help="Q4_0: scale from the largest magnitude; Q4_K_S: searched for, far slower")  # fmt: skip
    parser.add_argument("--convert-options", default="", metavar="TEXT", help='more for l4convert: "--jobs 2"')
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers here")
    return parser.parse_args()


def make_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """In a process of its own: the memory of this one would count in its children's."""
    command = [sys.executable, str(HERE / "make_checkpoint.py"), "--output", str(folder), "--preset", options.preset]
    done = subprocess.run([*command, "--layers", options.layers, "--vocab", options.vocab],
                          stdout=subprocess.DEVNULL, check=False)  # fmt: skip
    if done.returncode:
        raise Unavailable("no checkpoint was made")
    return folder


def measure_all(jobs: Sequence[Workload], source: Source, rounds: int) -> list[Row]:
    """Every workload once a round, so that what changes on the machine meets all of them."""
    rows = [Row(job.what, job.group, job.cache, job.missing) for job in jobs]
    for number in range(1, rounds + 1):
        for index, job in enumerate(jobs):
            if rows[index].missing:
                continue
            say(f"round {number} of {rounds}: {job.what}, {job.cache}")
            try:
                rows[index] = added(rows[index], *measure(job), source)
            except Unavailable as error:
                rows[index] = Row(job.what, job.group, job.cache, str(error))
    for job in jobs:
        if job.output:
            remove(job.output)
    say("")
    return rows


def measure(job: Workload) -> tuple[Run, int]:
    """One run, and the bytes that it wrote.

    Raises:
        Unavailable: It failed, or what it reads could not be put into the cache or out of it.
    """
    if job.output:
        remove(job.output)
    os.sync()  # what others wrote is not to be waited for in here
    (evict if job.cache == COLD else warm)(job.reads)
    done = run(job.command, job.environment)
    written = size_of(job.output) if job.output else 0
    if job.output and not job.keep:
        remove(job.output)
    return done, written


def added(row: Row, done: Run, written: int, source: Source) -> Row:
    """The row with one more run."""
    parameters = int(done.report.get("parameters", source.parameters))
    whole = parameters == source.parameters
    return replace(
        row,
        parameters=parameters,
        bytes_in=source.bytes if whole else BYTES * parameters,
        bytes_out=written,
        seconds=(*row.seconds, done.seconds),
        peak_rss=max(row.peak_rss, done.peak_rss),
        peak_anonymous=max(row.peak_anonymous, done.peak_anonymous),
    )


def say(text: str) -> None:
    """Progress on a terminal: one line that is written over."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on; a load near 0 says that nothing else ran."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.partition(": ")[2] or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "requirements_llama": [line for line in REQUIREMENTS.read_text().splitlines() if "==" in line],
    }


def result(
    options: argparse.Namespace, source: Source, rows: Sequence[Row], described: dict[str, Any]
) -> dict[str, Any]:
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    hidden = ("json", "scratch", "checkpoint")  # folders of one machine say nothing to another
    return {
        "schema": "l4convert.conversions/1",
        "machine": described,
        "options": {key: value for key, value in settings.items() if key not in hidden},
        "checkpoint": {"parameters": source.parameters, "bytes": source.bytes, "files": len(source.files)},
        "rows": [as_json(row, rows) for row in rows],
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
