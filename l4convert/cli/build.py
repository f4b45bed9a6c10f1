"""``l4convert build``: an artifact gets engines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4convert.cli._complete import hardware_names
from l4convert.cli._render import fields, size, table
from l4convert.cli._settings import Settings, global_options, settings_of
from l4convert.errors import UsageError

if TYPE_CHECKING:
    from l4convert.engine import BuildResult
    from l4convert.engine.jobs import BuildPlan

EPILOG = """\b
Examples:
  l4convert convert Llama-4-Scout --output scout --target tensorrt-rtx
  l4convert build scout --target rtx-pro-6000 --target rtx-5090
  l4convert build scout --target rtx-5090 --max-context 131072 --dry-run    does it fit? what would be built?
  l4convert build scout --target l40s --layers-per-engine 8 --segments 0-2  one machine's share of the engines
  l4convert build scout-trt --target h100       TensorRT with the library of `l4convert plugins build`

\b
No GPU is needed where the artifact is for tensorrt-rtx. Engines that are built already are kept; run the command again
after it was interrupted. `l4convert targets` lists the hardware; a profile of your own is a FILE.toml like those.
"""


@click.command("build", epilog=EPILOG)
@click.argument("artifact", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, required=True, metavar="NAME|FILE", shell_complete=hardware_names,
              help="Hardware to build for; may be given several times.")  # fmt: skip
@click.option("--max-batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Most sequences of a call.")  # fmt: skip
@click.option("--max-context", type=click.IntRange(min=1), metavar="N",
              help="Most tokens of a sequence.  [default: 8192, or the model's positions if fewer]")  # fmt: skip
@click.option("--prefill-tokens", type=click.IntRange(min=1), default=512, show_default=True, metavar="N",
              help="Most new tokens of a call.")  # fmt: skip
@click.option("--layers-per-engine", type=click.IntRange(min=1), metavar="N",
              help="Cut the model into engines of N layers, to build them in less memory.")  # fmt: skip
@click.option("--segments", metavar="LIST", help="Build only these of them, counted from 0, as 0-2,5.")
@click.option("--skip-segment-check", is_flag=True,
              help="Do not compare the cut model with the whole one in ONNX Runtime.")  # fmt: skip
@click.option("--memory-limit", metavar="SIZE",
              help="Most memory to use, as 20G.  [default: what the machine has free]")  # fmt: skip
@click.option("--plugins", type=click.Path(path_type=Path), metavar="FILE",
              help="The plugin library, for engines of the target tensorrt.  "
                   "[default: build/plugins/libl4convert_plugins.so]")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Check everything and show what would be built; write nothing.")
@click.option("--overwrite", is_flag=True, help="Build again what is built already.")
@global_options
@click.pass_context
def command(
    ctx: click.Context, /, *, segments: str | None, skip_segment_check: bool, dry_run: bool, **values: Any
) -> None:
    """Build engines from the artifact in folder OUT and put them into its folder engines/."""
    from l4convert.engine import BuildOptions, build_engines, plan_build

    settings = settings_of(ctx)
    chosen = None if segments is None else parse_segments(segments)
    if chosen is not None and values["layers_per_engine"] is None:
        raise UsageError("--segments needs --layers-per-engine", "say how many layers an engine has")
    options = BuildOptions(**values, segments=chosen, check_segments=not skip_segment_check)
    if dry_run:
        plan = plan_build(options)
        settings.emit("build", _plan_payload(plan), _plan_text(plan))
        return
    result = build_engines(options, settings.progress())
    settings.emit("build", _payload(result), _text(result, settings), summary=True)


def parse_segments(text: str) -> tuple[int, ...]:
    """``"0-2,5"`` as (0, 1, 2, 5).

    Raises:
        UsageError: It is no such list.
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UsageError(f"--segments {text!r} is not a list of numbers", "write it as 0-2,5")
        chosen += range(first, last + 1)
    return tuple(chosen)


def _plan_payload(plan: BuildPlan) -> dict[str, Any]:
    engines = [
        {
            **job.inputs,
            "weights_bytes": job.facts.weights_bytes,
            "caches_bytes": job.caches_bytes,
            "build_memory_bytes": job.memory_bytes,
        }
        for job in plan.jobs
    ]
    return {"dry_run": True, "artifact": str(plan.out), "engines": engines}


def _plan_text(plan: BuildPlan) -> str:
    rows = []
    for job in plan.jobs:
        amounts = (job.facts.weights_bytes, job.caches_bytes, job.memory_bytes)
        rows.append((job.hardware.name, job.span.name, *map(size, amounts)))
    headers = ["target", "engine", "weights", "KV caches", "memory to build"]
    return table(headers, rows, right=(2, 3, 4))


def _payload(result: BuildResult) -> dict[str, Any]:
    engines = [
        {
            **engine.entry,
            "bytes_per_quantized_weight": engine.bytes_per_weight,
            "seconds": round(engine.seconds, 3),
            "peak_memory_bytes": engine.peak_memory,
            "skipped": engine.skipped,
        }
        for engine in result.engines
    ]
    return {
        "dry_run": False,
        "artifact": str(result.out),
        "builder": result.builder.as_dict(),
        "segments_checked": result.segments_checked,
        "engines": engines,
    }


def _text(result: BuildResult, settings: Settings) -> str:
    rows = []
    for engine in result.engines:
        entry = engine.entry
        name = Path(entry["path"]).stem
        per_weight = "-" if engine.bytes_per_weight is None else f"{engine.bytes_per_weight:.3f}"
        took = "built already" if engine.skipped else f"{engine.seconds:.1f} s"
        memory = "-" if engine.skipped else size(engine.peak_memory)
        scratch = size(max(entry["scratch_bytes"], default=0))
        target, capability = entry["hardware"], entry["compute_capability"]
        rows.append((target, capability, name, size(entry["bytes"]), per_weight, scratch, memory, took))
    headers = ["target", "SM", "engine", "plan", "bytes/weight", "scratch", "memory", "time"]
    parts = [table(headers, rows, right=(3, 4, 5, 6, 7))]
    if result.segments_checked is not None:
        text = "equal the whole graph" if result.segments_checked else "were not compared with the whole graph"
        parts.append(f"The segments {text}.")
    if settings.verbose:
        builder = f"{result.builder.name} {result.builder.version}"
        lines = [(f"scratch of {e.entry['path']}", e.entry["scratch_bytes"]) for e in result.engines]
        parts.append(fields([("builder", builder), *lines]))
    parts.append(
        "bytes/weight: the plan, less unquantized tensors, for each quantized weight; memory: peak of the builder."
    )
    return "\n\n".join(parts)
