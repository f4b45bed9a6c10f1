"""``l4convert targets``: what an artifact can be made for."""

from __future__ import annotations

import click

from l4convert.cli._render import table
from l4convert.cli._settings import global_options, settings_of

EPILOG = """\b
Examples:
  l4convert targets
  l4convert convert CKPT --output OUT --target portable
"""


@click.command("targets", epilog=EPILOG)
@global_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the targets of `convert --target`."""
    from l4convert.targets import TARGETS

    rows = [(t.name, ", ".join(t.kv_caches), ", ".join(t.compute), t.summary) for t in TARGETS.values()]
    payload = [
        {"name": t.name, "summary": t.summary, "kv_caches": list(t.kv_caches), "compute": list(t.compute)}
        for t in TARGETS.values()
    ]
    text = table(["target", "KV caches", "computes in", "what it is"], rows)
    settings_of(ctx).emit("targets", {"targets": payload}, text)
