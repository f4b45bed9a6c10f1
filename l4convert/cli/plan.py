"""``l4convert plan``: what a conversion would write and need, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4convert.cli import _conversion
from l4convert.cli._adapters import adapter_folders
from l4convert.cli._conversion import conversion_options
from l4convert.cli._settings import global_options, settings_of

EPILOG = f"""{_conversion.EPILOG}
\b
Examples:
  l4convert plan Llama-4-Scout --output /data/scout-int4      does it fit, and how long will it take?
  l4convert plan --preset maverick --recipe fp8               a published model, without its checkpoint
  l4convert plan --preset behemoth --tensors                  every tensor with its file and offset
  l4convert plan --preset scout --target h100                 the largest context that fits on GPUs, and how fast
  l4convert plan --preset scout --target h100 --context 1M    the GPUs that a context needs
  l4convert plan CKPT --target h200 --context 128k --batch 8 --explain

\b
Hardware:
  --target also takes a GPU of `l4convert targets`, or a profile FILE.toml; the artifact is then for its first runtime.
  Contexts: k is 1024 tokens, M is 1048576. --explain prints the arithmetic of every number.

\b
Exit code 3 when the disk at OUT is too small, with the missing bytes named.
"""


@click.command("plan", epilog=EPILOG)
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=click.Path(path_type=Path))
@click.option("--preset", metavar="NAME", help="Plan for scout, maverick or behemoth instead of a checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT",
              help="Folder to write later: compare with the free disk there.")  # fmt: skip
@conversion_options
@click.option("--context", metavar="TOKENS", help="Tokens of a sequence, as 128k or 1M; else the largest that fits.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Sequences at once.")  # fmt: skip
@click.option("--prefill-tokens", type=click.IntRange(min=1), default=512, show_default=True, metavar="N",
              help="New tokens of a call that reads a prompt.")  # fmt: skip
@click.option("--tensor-parallel", type=click.IntRange(min=1), metavar="N",
              help="GPUs that share the heads.  [default: as few as fit]")  # fmt: skip
@click.option("--explain", is_flag=True, help="Print every number with its arithmetic and source.")
@click.option("--tensors", is_flag=True, help="List every tensor; --json always does.")
@click.option("--no-measure", is_flag=True, help="Do not measure this machine for two seconds to estimate the time.")
@click.option("--overwrite", is_flag=True, help="OUT may be an artifact that will be replaced.")
@global_options
@click.pass_context
def command(
    ctx: click.Context, /, *, tensors: bool, no_measure: bool, explain: bool, adapters: tuple[Path, ...], **values: Any
) -> None:
    """Plan the conversion of the checkpoint in folder CKPT, or of a published model.

    Reads configuration and file headers, no weight, and writes nothing.
    """
    from l4convert.cli._plan import show_plan
    from l4convert.pipeline import PlanOptions, plan_conversion

    settings = settings_of(ctx)
    options = PlanOptions(adapters=adapter_folders(adapters, settings), **values)
    show_plan(settings, plan_conversion(options, measure=not no_measure), tensors, explain)
