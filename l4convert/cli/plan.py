"""``l4convert plan``: what a conversion would write and need, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4convert.cli import _conversion
from l4convert.cli._conversion import conversion_options
from l4convert.cli._settings import global_options, settings_of

EPILOG = f"""{_conversion.EPILOG}
\b
Examples:
  l4convert plan Llama-4-Scout --output /data/scout-int4      does it fit, and how long will it take?
  l4convert plan --preset maverick --recipe fp8               a published model, without its checkpoint
  l4convert plan --preset behemoth --tensors                  every tensor with its file and offset

\b
Exit code 3 when the disk at OUT is too small, with the missing bytes named.
"""


@click.command("plan", epilog=EPILOG)
@click.argument("checkpoint", metavar="[CKPT]", required=False, type=click.Path(path_type=Path))
@click.option("--preset", metavar="NAME", help="Plan for scout, maverick or behemoth instead of a checkpoint.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="OUT",
              help="Folder to write later: compare with the free disk there.")  # fmt: skip
@conversion_options
@click.option("--tensors", is_flag=True, help="List every tensor; --json always does.")
@click.option("--no-measure", is_flag=True, help="Do not measure this machine for two seconds to estimate the time.")
@click.option("--overwrite", is_flag=True, help="OUT may be an artifact that will be replaced.")
@global_options
@click.pass_context
def command(ctx: click.Context, /, *, tensors: bool, no_measure: bool, **values: Any) -> None:
    """Plan the conversion of the checkpoint in folder CKPT, or of a published model.

    Reads configuration and file headers, no weight, and writes nothing.
    """
    from l4convert.cli._plan import show_plan
    from l4convert.pipeline import PlanOptions, plan_conversion

    plan = plan_conversion(PlanOptions(**values), measure=not no_measure)
    show_plan(settings_of(ctx), plan, tensors)
