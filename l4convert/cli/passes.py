"""``l4convert passes``: what is done to a graph, in order."""

from __future__ import annotations

import click

from l4convert.cli._render import table
from l4convert.cli._settings import global_options, settings_of

EPILOG = """\b
Examples:
  l4convert passes
  l4convert convert CKPT --output OUT --verify-passes   run the graph before and after each
"""


@click.command("passes", epilog=EPILOG)
@global_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the graph passes in the order in which `convert` runs them, then those that `optimize` runs before these."""
    from l4convert.graph_passes import PASSES

    rows = [(number, item.name, item.summary) for number, item in enumerate(PASSES, 1)]
    payload = [{"name": item.name, "summary": item.summary} for item in PASSES]
    settings_of(ctx).emit("passes", {"passes": payload}, table(["no.", "pass", "what it does"], rows, right=[0]))
