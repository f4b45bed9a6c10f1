"""``l4convert convert``: a checkpoint becomes an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4convert.cli import _conversion
from l4convert.cli._adapters import adapter_folders, adapter_rows, adapters_payload
from l4convert.cli._conversion import conversion_options
from l4convert.cli._network import network_payload, network_rows
from l4convert.cli._passes import passes_payload, passes_text
from l4convert.cli._render import fields, size
from l4convert.cli._settings import Settings, global_options, settings_of
from l4convert.cli._sharing import sharing_payload, sharing_rows

if TYPE_CHECKING:
    from l4convert.pipeline import ConvertOptions, ConvertResult

EPILOG = f"""{_conversion.EPILOG}
\b
Examples:
  l4convert convert Llama-4-Scout --output scout-int4
  l4convert convert Llama-4-Scout --output scout-fp8 --recipe fp8 --target portable
  l4convert convert Llama-4-Scout --output scout-int4 --dry-run        what would be written, and how large
  l4convert convert Llama-4-Scout --output scout-tuned --adapter my-lora
  l4convert convert hf://org/Llama-4-Scout --output scout-int4         from the Hugging Face Hub, without a copy of it
  l4convert convert Llama-4-Scout --output scout-kv8 --kv-dtype int8 --calibration notes.txt
"""


@click.command("convert", epilog=EPILOG)
@click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="OUT", help="Folder to write.")
@conversion_options
@click.option("--calibration", type=click.Path(path_type=Path), metavar="FILE",
              help="UTF-8 text like those the model will see, to find the scales of quantized caches on.")  # fmt: skip
@click.option("--calibration-tokens", type=click.IntRange(min=1), default=4096, show_default=True, metavar="N",
              help="Use so many tokens of it.")  # fmt: skip
@click.option("--verify-passes", is_flag=True, help="Run the graph before and after each pass and compare.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the plan (`l4convert plan`); write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is already at OUT.")
@click.option("--restart", is_flag=True, help="Discard what an unfinished run left at OUT; else it is continued.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Blocks of weights to convert at once.  [default: the number of cores]")  # fmt: skip
@click.option("--memory-limit", metavar="SIZE",
              help="Most memory to use on a machine, as 4G or 512M.  [default: a quarter of it]")  # fmt: skip
@click.option("--cluster", metavar="ADDRESS",
              help="Ray cluster whose machines share the work and the disks, as ray://HOST:10001.")  # fmt: skip
@global_options
@click.pass_context
def command(ctx: click.Context, /, *, dry_run: bool, adapters: tuple[Path, ...], **values: Any) -> None:
    """Convert the checkpoint in folder CKPT, or at hf://org/name[@revision], into an ONNX artifact.

    Everything is checked before anything is written, and OUT appears only when it is complete. After a run that was
    killed, interrupted or stopped by a full disk, the same command goes on where it ended.
    """
    from l4convert.pipeline import ConvertOptions, convert, plan_conversion

    settings = settings_of(ctx)
    options = ConvertOptions(adapters=adapter_folders(adapters, settings), **values)
    if dry_run:
        from l4convert.cli._plan import show_plan

        show_plan(settings, plan_conversion(options, measure=True))
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
        "kv_scheme": None if result.kv_scheme is None else result.kv_scheme.to_dict(),
        "adapters": adapters_payload(result.adapters),
        "calibration": None if result.calibration is None else result.calibration.to_dict(),
        "compute": result.compute,
        "passes": passes_payload(result.passes),
        "bytes": result.bytes,
        "tensors": result.tensors,
        "shared": None if result.sharing is None else sharing_payload(result.sharing),
        "machines": result.machines,
        "network": network_payload(result.traffic),
        "resumed_bytes": result.resumed_bytes,
        "seconds": round(result.seconds, 3),
    }


def _text(options: ConvertOptions, result: ConvertResult, settings: Settings) -> str:
    """What was written, what the passes did, and the command to run next."""
    from l4convert.checkpoint.text import address_text, known_name

    summary = fields(
        [
            ("wrote", result.output),
            ("size", f"{size(result.bytes)} in {result.tensors:,} tensors"),
            *([] if result.sharing is None else sharing_rows(result.sharing)),
            *([("resumed", f"{size(result.resumed_bytes)} written by an earlier run")] if result.resumed_bytes else []),
            *([("machines", result.machines)] if options.cluster else []),
            ("time", f"{result.seconds:.1f} s"),
            *network_rows(result.traffic),
            ("target", result.target),
            ("recipe", result.recipe),
            *adapter_rows(result.adapters),
            ("KV cache", result.kv_cache),
            *_kv_rows(result),
            ("computes in", result.compute),
        ]
    )
    following = f"Next: l4convert validate {result.output} --reference {address_text(options.checkpoint)}"
    following += "".join(f" --adapter {known_name(folder) or folder}" for folder in options.adapters)
    return "\n\n".join([summary, passes_text(result.passes, settings.verbose), following])


def _kv_rows(result: ConvertResult) -> list[tuple[str, object]]:
    if result.kv_scheme is None or result.calibration is None:
        return []
    text = result.calibration
    return [("keys, values", result.kv_scheme), ("calibrated", f"on {len(text.ids):,} tokens of {text.name}")]
