"""``l4convert optimize``: the passes, applied to an ONNX model that somebody else exported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4convert.cli._complete import recipe_names, target_names
from l4convert.cli._passes import passes_payload
from l4convert.cli._render import fields, size, table
from l4convert.cli._settings import Settings, global_options, settings_of

if TYPE_CHECKING:
    from l4convert.optimizing import OptimizeResult

EPILOG = """\b
Recipes are those of `l4convert convert`; patterns are matched against transformers' names, which are recovered from
what the exporter noted down (pass name_weights).

\b
Examples:
  l4convert optimize exported/model.onnx --output faster --verify            same numbers, fewer and better kernels
  l4convert optimize exported/model.onnx --output small --recipe int4
  l4convert optimize exported/model.onnx --output small --dry-run            what would match, and what would not
"""
_MOST_REASONS = 8


@click.command("optimize", epilog=EPILOG)
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to write.")
@click.option("--target", default="cpu", show_default=True, metavar="NAME", shell_complete=target_names,
              help="What to make it for; `l4convert targets` lists them.")  # fmt: skip
@click.option("--recipe", default="none", show_default=True, metavar="NAME|FILE", shell_complete=recipe_names,
              help="How to quantize weights; none: not at all.")  # fmt: skip
@click.option("--block-size", type=click.Choice([32, 64, 128]),
              help="Weights that share an INT4 scale.  [default: 128 for TensorRT, else the recipe's]")  # fmt: skip
@click.option("--verify", is_flag=True, help="Run both models on random inputs (ONNX Runtime) and compare outputs.")
@click.option("--dry-run", is_flag=True, help="Read, match and report; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already at OUT.")
@click.option("--restart", is_flag=True, help="Discard what an unfinished run left at OUT; else it is continued.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Blocks of weights to write at once.  [default: the number of cores]")  # fmt: skip
@click.option("--memory-limit", metavar="SIZE",
              help="Most memory to use, as 4G or 512M.  [default: a quarter of it]")  # fmt: skip
@global_options
@click.pass_context
def command(ctx: click.Context, /, **values: Any) -> None:
    """Apply the graph passes to MODEL.onnx, an exported Llama 4 graph, and write the result to folder OUT.

    Inputs and outputs keep their names, types and shapes. What no pass knows stays as it is, and is told with the
    reason.
    """
    from l4convert.optimizing import OptimizeOptions, optimize

    settings = settings_of(ctx)
    options = OptimizeOptions(**values)
    result = optimize(options, settings.progress())
    payload, text = _payload(result, options.dry_run), _text(result, options.dry_run, settings)
    settings.emit("optimize", payload, text, summary=not options.dry_run)


def _payload(result: OptimizeResult, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "model": str(result.model),
        "output": str(result.output),
        "target": result.target,
        "recipe": result.recipe,
        "compute": result.compute,
        "passes": passes_payload(result.passes),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "nodes_before": result.nodes_before,
        "nodes_after": result.nodes_after,
        "tensors": result.tensors,
        "quantized": result.quantized,
        "notes": list(result.notes),
        "verify": None if result.comparison is None else result.comparison.to_dict(),
        "seconds": round(result.seconds, 3),
    }


def _text(result: OptimizeResult, dry_run: bool, settings: Settings) -> str:
    rows: list[tuple[str, object]] = [
        ("would write" if dry_run else "wrote", result.output),
        ("size", f"{size(result.bytes_before)} -> {size(result.bytes_after)} in {result.tensors:,} tensors"),
        ("nodes", f"{result.nodes_before:,} -> {result.nodes_after:,}"),
        ("target", result.target),
        ("recipe", result.recipe),
        ("computes in", result.compute),
        ("time", f"{result.seconds:.1f} s"),
    ]
    parts = [fields(rows), _passes(result), _reasons(result, None if settings.verbose else _MOST_REASONS)]
    parts += [_comparison(result), "\n".join(f"note: {note}" for note in result.notes)]
    return "\n\n".join(part for part in parts if part)


def _passes(result: OptimizeResult) -> str:
    rows = [(report.name, report.fired, len(report.skipped)) for report in result.passes]
    return table(["pass", "fired", "skipped"], rows, right=[1, 2])


def _reasons(result: OptimizeResult, most: int | None) -> str:
    """Why passes left places alone, the most frequent reasons first."""
    found = Counter((report.name, reason) for report in result.passes for _, reason in report.skipped)
    if result.recipe == "none":
        found.pop(("quantize_weights", "the recipe keeps it"), None)
    rows = [(name, number, reason) for (name, reason), number in found.most_common(most)]
    text = table(["skipped by", "places", "because"], rows, right=[1]) if rows else ""
    hidden = len(found) - len(rows)
    return f"{text}\n({hidden} more reasons: -v shows them)" if hidden else text


def _comparison(result: OptimizeResult) -> str:
    if result.comparison is None:
        return ""
    rows = [(o.name, f"{o.error:.3g}", f"{o.mean:.3g}", f"{o.largest:.3g}") for o in result.comparison.outputs]
    text = table(["output", "largest difference", "mean", "largest value"], rows, right=[1, 2, 3])
    return f"{text}\non {', '.join(result.comparison.probes)}; beside the given model on ONNX Runtime"
