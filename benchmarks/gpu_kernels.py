"""The plugins' kernels on a GPU: right over random shapes, and how fast on real ones beside limits and peers.

    python benchmarks/gpu_kernels.py --dry-run [--hardware NAME|FILE] [--only TEXT]

prints every row of real shapes with its bytes, FLOPs and least time on a bundled hardware profile; nothing is run and
no GPU is needed. The rows are measured by ``benchmarks/gpu.py`` (``make gpu``).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_cases import Scale, groups
from gpu_correctness import Checked, check
from gpu_hardware import capability
from gpu_library import Kernels, NotBuilt, build_for
from gpu_plugins import PluginKernels
from gpu_report import (
    Section,
    correctness_json,
    correctness_section,
    limits_section,
    planned_section,
    speed_json,
    speed_section,
)
from gpu_speed import Bench
from gpu_tensors import Maker
from gpu_timing import machine_limits
from gpu_workloads import ROWS
from roofline import Limits, published

from l4convert.errors import L4Error
from l4convert.gpus import Gpu
from l4convert.plugins.library.calling import CORE

KERNELS_TITLE = "Kernels against the functions' bodies"
PLUGINS_TITLE = "TensorRT plugins, without TensorRT, against the functions' bodies"
FEWER = Scale(tokens=(1, 100), chunks=(256,), lengths=500, new=300)


@dataclass(frozen=True)
class Part:
    """What became of the kernels' part.

    Attributes:
        sections: Of the table.
        content: The same for JSON.
        measured: Whether anything ran.
        passed: Whether nothing went wrong.
    """

    sections: tuple[Section, ...]
    content: dict[str, Any] = field(default_factory=dict)
    measured: bool = True
    passed: bool = True


def unmeasured(problem: str, failed: bool = False) -> Part:
    """All rows for one reason: nothing was run, or (``failed``) what has to come first did not work."""
    word = "failed" if failed else "not measured"
    title = "Kernels against the functions' bodies, and on real shapes"
    return Part((Section(title, [], note=f"{word}: {problem}"),), {"problem": f"{word}: {problem}"}, False, not failed)


def measure(gpu: Gpu, plugins: Path | None, only: str, seed: int) -> Part:
    """Check and time everything whose name has ``only`` in it.

    Args:
        gpu: The first GPU.
        plugins: The library; None builds it for this GPU.
        only: Part of a row's name.
        seed: Of the random shapes.
    """
    try:
        import torch
    except ImportError:
        return unmeasured("torch is not installed: pip install torch")
    if not torch.cuda.is_available():
        return unmeasured(f"torch {torch.__version__} does not see the GPU: it needs a build with CUDA")
    sm = int("".join(map(str, capability(gpu))))
    try:
        if plugins is None:
            say(f"... building the library for SM {sm}")
        library = plugins or build_for(sm)
        properties = torch.cuda.get_device_properties(0)
        torch.empty(1, device="cuda")  # makes its context the current one
        kernels = Kernels(torch, library, "cuda", sm, properties.multi_processor_count)
        kernels.preload()
    except NotBuilt as error:
        return unmeasured(str(error), failed=error.failed)
    except L4Error as error:
        return unmeasured(str(error), failed=True)
    limits, measured = machine_limits(torch)  # first: a kernel that faults takes the whole context with it
    part = run(torch, kernels, limits, (properties.total_memory, properties.L2_cache_size), only, seed)
    return replace(
        part, sections=(limits_section(measured), *part.sections), content={"limits": measured, **part.content}
    )


def run(torch: Any, kernels: Kernels, limits: Limits, sizes: tuple[int, int], only: str, seed: int) -> Part:
    """Check and time on a device that is ready; ``sizes``: bytes of its memory and of its L2 cache."""
    torch.manual_seed(seed)
    checked = correctness(torch, kernels, only, seed)
    plugged = through_plugins(torch, kernels, only, seed)
    rows = [row for row in ROWS if only in row.name]
    timed = list(Bench(torch, kernels, limits, *sizes).measured(rows, say))
    version = kernels.library.version
    note = f"Library of l4convert {version}, SM {kernels.sm}. Median time of one call; random weights."
    content = {
        "library": version, "sm": kernels.sm, "seed": seed, "correctness": correctness_json(checked),
        "plugins": correctness_json(plugged), "speed": speed_json(timed, limits),
    }  # fmt: skip
    sections = (
        correctness_section(KERNELS_TITLE, checked), correctness_section(PLUGINS_TITLE, plugged),
        speed_section(timed, limits, note),
    )  # fmt: skip
    passed = all(result.passed for result in (*checked, *plugged, *timed))
    return Part(sections, content, bool(checked or timed), passed)


def correctness(torch: Any, kernels: Kernels, only: str, seed: int, scale: Scale | None = None) -> list[Checked]:
    """Every group of random shapes; the seed also decides what the tensors hold."""
    results = []
    for group in groups(scale or Scale(), seed):
        if only in group.name:
            say(f"... {group.name}")
            results.append(check(kernels, lambda compute: Maker(torch, kernels.device, compute), group))
            say(f"    {results[-1].cases} cases, error {results[-1].error:.2g} {results[-1].problem}")
    return results


def through_plugins(torch: Any, kernels: Kernels, only: str, seed: int) -> list[Checked]:
    """The same, with fewer cases, through ``IPluginV3``: what TensorRT would call."""
    if not (kernels.library.path.parent / CORE).is_file():
        problem = "not measured: the library was built without TensorRT's headers (pip install kernel-lens)"
        return [Checked("all", problem=problem, measured=False)]
    plugins = PluginKernels(torch, kernels.library.path, kernels.device, kernels.sm, kernels.multiprocessors)
    return correctness(torch, plugins, only, seed, FEWER)


def say(line: str) -> None:
    """Progress, for those who wait, and what is left of a run that is stopped."""
    print(line, file=sys.stderr, flush=True)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", required=True, help="print the rows; run nothing")
    parser.add_argument("--hardware", default="h100", metavar="NAME|FILE", help="profile (default: h100)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows that have this in their name")
    options = parser.parse_args(arguments)
    hardware, limits = published(parser, options.hardware)
    rows = [row for row in ROWS if options.only in row.name]
    print(f"{hardware.summary}: limits as published, nothing is measured\n")
    print(planned_section(rows, limits, hardware.memory_bytes).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
