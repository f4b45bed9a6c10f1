"""``l4convert inspect``: what is in a checkpoint or an artifact, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import click

from l4convert.cli._settings import global_options, settings_of

EPILOG = """\b
Examples:
  l4convert inspect Llama-4-Scout              a checkpoint: layers, parameters, bytes
  l4convert inspect Llama-4-Scout --tensors    and every tensor
  l4convert inspect hf://org/Llama-4-Scout     one on the Hugging Face Hub: only headers are read
  l4convert inspect scout-int4                 an artifact: manifest, operators, inputs and outputs
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("path", metavar="CKPT|OUT", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@global_options
@click.pass_context
def command(ctx: click.Context, path: Path, tensors: bool) -> None:
    """Describe the checkpoint or artifact in a folder; reads configuration and headers only."""
    from l4convert.cli import _inspect_artifact, _inspect_checkpoint

    kind = _inspect_artifact if (path / "l4convert.json").is_file() else _inspect_checkpoint
    payload, text = kind.describe(path, tensors)
    settings_of(ctx).emit("inspect", payload, text)
