"""``l4convert convert``: a checkpoint becomes an artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4convert.cli._complete import recipe_names, target_names
from l4convert.cli._render import fields, size, table
from l4convert.cli._settings import Settings, global_options, settings_of

if TYPE_CHECKING:
    from l4convert.pipeline import ConversionPlan, ConvertOptions, ConvertResult, PassReport

EPILOG = """\b
Recipes:
  int4          weights of attention, MLP and experts in 4 bits, one scale a block
  fp8           the same weights in E4M3, activations quantized per token at run time
  fp8-experts   only the routed experts in E4M3
  none          weights as the checkpoint has them
  FILE.toml     your own: a scheme for each name pattern, the first match wins

\b
KV caches:
  growing       the past is an input that grows; what ONNX Runtime GenAI and optimum expect by default
  static        preallocated buffers, updated in place
  windowed      growing, but chunked layers keep at most one chunk: least memory

\b
Examples:
  l4convert convert Llama-4-Scout --output scout-int4
  l4convert convert Llama-4-Scout --output scout-fp8 --recipe fp8 --target portable
  l4convert convert Llama-4-Scout --output scout-int4 --dry-run        what would be written, and how large
"""


@click.command("convert", epilog=EPILOG)
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to write.")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", shell_complete=target_names,
              help="What to make it for; `l4convert targets` lists them.")  # fmt: skip
@click.option("--recipe", default="int4", show_default=True, metavar="NAME|FILE",
              help="How to quantize; see below.",
              shell_complete=recipe_names)  # fmt: skip
@click.option("--block-size", type=click.Choice([32, 64, 128]),
              help="Weights that share an INT4 scale.  [default: the recipe's]")  # fmt: skip
@click.option("--kv-cache", type=click.Choice(["growing", "static", "windowed"]), default="growing", show_default=True,
              help="Form of the key/value cache; see below.")  # fmt: skip
@click.option("--verify-passes", is_flag=True, help="Run the graph before and after each pass and compare.")
@click.option("--dry-run", is_flag=True, help="Check the checkpoint and show the plan; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already at OUT.")
@click.option("--restart", is_flag=True, help="Discard what an unfinished run left at OUT; else it is continued.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Blocks of weights to convert at once.  [default: the number of cores]")  # fmt: skip
@click.option("--memory-limit", metavar="SIZE",
              help="Most memory to use, as 4G or 512M.  [default: a quarter of the machine's]")  # fmt: skip
@global_options
@click.pass_context
def command(ctx: click.Context, /, *, dry_run: bool, **values: Any) -> None:
    """Convert the checkpoint in folder CKPT into an ONNX artifact.

    Everything is checked before anything is written, and OUT appears only when it is complete. After a run that was
    killed, interrupted or stopped by a full disk, the same command goes on where it ended.
    """
    from l4convert.pipeline import ConvertOptions, convert, plan_conversion

    settings = settings_of(ctx)
    options = ConvertOptions(**values)
    if dry_run:
        plan = plan_conversion(options)
        settings.emit("convert", _plan_payload(options, plan), _plan_text(options, plan))
        return
    result = convert(options, settings.progress())
    settings.emit("convert", _payload(result), _text(options, result, settings), summary=True)


def _payload(result: ConvertResult) -> dict[str, Any]:
    return {
        "dry_run": False,
        "output": str(result.output),
        "target": result.target,
        "recipe": result.recipe,
        "kv_cache": result.kv_cache,
        "passes": _passes_payload(result.passes),
        "bytes": result.bytes,
        "tensors": result.tensors,
        "resumed_bytes": result.resumed_bytes,
        "seconds": round(result.seconds, 3),
    }


def _plan_payload(options: ConvertOptions, plan: ConversionPlan) -> dict[str, Any]:
    return {
        "dry_run": True,
        "output": str(options.output),
        "target": options.target,
        "recipe": options.recipe,
        "kv_cache": options.kv_cache,
        "passes": _passes_payload(plan.passes),
        "bytes": plan.bytes,
        "tensors": plan.tensors,
        "files": dict(plan.files),
    }


def _passes_payload(passes: Sequence[PassReport]) -> list[dict[str, Any]]:
    return [
        {
            "name": report.name,
            "fired": report.fired,
            "skipped": [{"node": node, "reason": reason} for node, reason in report.skipped],
        }
        for report in passes
    ]


def _text(options: ConvertOptions, result: ConvertResult, settings: Settings) -> str:
    """What was written, what the passes did, and the command to run next."""
    summary = fields(
        [
            ("wrote", result.output),
            ("size", f"{size(result.bytes)} in {result.tensors:,} tensors"),
            *([("resumed", f"{size(result.resumed_bytes)} written by an earlier run")] if result.resumed_bytes else []),
            ("time", f"{result.seconds:.1f} s"),
            ("target", result.target),
            ("recipe", result.recipe),
            ("KV cache", result.kv_cache),
        ]
    )
    following = f"Next: l4convert validate {result.output} --reference {options.checkpoint}"
    return "\n\n".join([summary, _passes_text(result.passes, settings.verbose), following])


def _plan_text(options: ConvertOptions, plan: ConversionPlan) -> str:
    summary = fields(
        [
            ("would write", options.output),
            ("size", f"{size(plan.bytes)} in {plan.tensors:,} tensors"),
            ("target", options.target),
            ("recipe", options.recipe),
            ("KV cache", options.kv_cache),
        ]
    )
    files = table(["file", "size"], [(name, size(nbytes)) for name, nbytes in plan.files.items()], right=[1])
    return "\n\n".join([summary, files, _passes_text(plan.passes, verbose=True)])


def _passes_text(passes: Sequence[PassReport], verbose: bool) -> str:
    """How often each pass fired; with ``verbose``, why it did not elsewhere, by reason."""
    rows = [(report.name, report.fired, len(report.skipped)) for report in passes]
    text = table(["pass", "fired", "skipped"], rows, right=[1, 2])
    reasons = [
        f"{report.name} skipped {number}: {reason}"
        for report in passes
        for reason, number in Counter(reason for _, reason in report.skipped).items()
    ]
    return "\n".join([text, *reasons]) if verbose and reasons else text
