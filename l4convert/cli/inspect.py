"""``l4convert inspect``: what is in a checkpoint, an adapter or an artifact, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import click

from l4convert.cli._settings import global_options, settings_of

EPILOG = """\b
Examples:
  l4convert inspect Llama-4-Scout              a checkpoint: layers, parameters, bytes
  l4convert inspect Llama-4-Scout --tensors    and every tensor
  l4convert inspect my-lora                    a LoRA adapter: rank, scale, what it changes
  l4convert inspect hf://org/Llama-4-Scout     one on the Hugging Face Hub: only headers are read
  l4convert inspect scout-int4                 an artifact: manifest, operators, inputs and outputs
"""


@click.command("inspect", epilog=EPILOG)
@click.argument("path", metavar="CKPT|DIR|OUT", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@global_options
@click.pass_context
def command(ctx: click.Context, path: Path, tensors: bool) -> None:
    """Describe the checkpoint, adapter or artifact in a folder; reads configuration and headers only."""
    from l4convert.checkpoint.adapters import is_adapter
    from l4convert.cli import _inspect_adapter, _inspect_artifact, _inspect_checkpoint

    describe = _inspect_adapter.describe if is_adapter(path) else _inspect_checkpoint.describe
    if (path / "l4convert.json").is_file():
        describe = _inspect_artifact.describe
    payload, text = describe(path, tensors)
    settings_of(ctx).emit("inspect", payload, text)
