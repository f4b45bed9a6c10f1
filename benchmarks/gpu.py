"""Everything that needs a GPU, on the one that is here: the plugins' kernels, engines, ONNX Runtime's CUDA provider.

    python benchmarks/gpu.py [--plugins FILE] [--only TEXT] [--part kernels|engines] [--results DIR]

One table in sections. Kernels (``gpu_kernels.py``): every one against its function's body over random shapes; then real
shapes of Scout and Maverick, timed beside what this GPU can copy and multiply, torch and ONNX Runtime. The library of
kernels is built for this GPU first, unless ``--plugins`` names one. Engines and provider (``gpu_engines.py``): the
bundled nano model, converted, built, validated and timed through the GPU.

What is not installed or what this GPU cannot do is a row that says so. Exit code 0: all else passed; 4: something did
not; 5: there is no GPU, or nothing to measure with.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_engines
import gpu_kernels
from gpu_environment import probe
from gpu_hardware import slug
from gpu_kernels import Part
from gpu_library import build_for
from gpu_report import SCHEMA

from l4convert.gpus import Gpu

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    *("torch", "triton", "onnx", "onnxruntime-gpu", "onnxruntime", "transformers"),
    *("tensorrt-rtx-cu13", "tensorrt"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=Path, metavar="FILE", help="the library (default: build it for this GPU)")
    parser.add_argument("--part", choices=("kernels", "engines"), help="only this part")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows that have this in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes and numbers")
    parser.add_argument("--tokens", type=int, default=3000, help="held-out tokens that engines are compared on")
    parser.add_argument("--work", type=Path, help="folder for the engines' artifacts (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder for the JSON")
    options = parser.parse_args(arguments)
    found = probe()
    if not found.devices:
        return 5
    gpu = found.devices[0]
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}-gpu-{slug(gpu.name)}.json"
    measure = {
        "kernels": lambda: gpu_kernels.measure(gpu, options.plugins, options.only, options.seed),
        "engines": lambda: engines(gpu, options.work, options.tokens, options.only),
    }
    parts: dict[str, Part] = {}
    for name in [options.part] if options.part else measure:
        parts[name] = measure[name]()
        print("\n" + "\n\n".join(section.markdown() for section in parts[name].sections), flush=True)
        # What was measured stays if the next part is cut short.
        file.write_text(json.dumps(content(gpu, found.driver, parts), indent=2, allow_nan=False) + "\n")
    print(f"\n{file}")
    return exit_code(list(parts.values()))


def engines(gpu: Gpu, work: Path | None, tokens: int, only: str) -> Part:
    """The part of engines and provider."""
    with tempfile.TemporaryDirectory() as folder:
        bench = gpu_engines.Bench(gpu, work or Path(folder), tokens, gpu_engines.l4convert, gpu_engines.load, build_for)
        rows = [row for row in gpu_engines.ROWS if only in row.name]
        results = [gpu_engines.measured(row, bench) for row in rows]
    content = {"tokens": tokens, "prompt": gpu_engines.PROMPT, "rows": gpu_engines.as_json(results)}
    measured = any(result.problem is None or not result.passed for result in results)
    return Part((gpu_engines.section(results),), content, measured, all(result.passed for result in results))


def exit_code(parts: Sequence[Part]) -> int:
    """4: something failed; 5: nothing was measured."""
    if not all(part.passed for part in parts):
        return 4
    return 0 if any(part.measured for part in parts) else 5


def content(gpu: Gpu | None, driver: str | None, parts: dict[str, Part], problem: str | None = None) -> dict[str, Any]:
    """The JSON: the device, the versions and every row; without a device, why the table is empty."""
    whole = {
        "schema": SCHEMA,
        "device": asdict(gpu) if gpu else None,
        "driver": driver,
        "libraries": versions(),
        "problem": problem,
        **{name: part.content for name, part in parts.items()},
    }
    return dict(gpu_kernels.finite(whole))


def versions() -> dict[str, str]:
    """Of what is installed of :data:`LIBRARIES`."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
