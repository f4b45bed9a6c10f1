"""``l4convert completion``: the script that makes a shell complete our commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from l4convert.cli._settings import global_options, settings_of

EPILOG = """\b
Examples:
  bash:  l4convert completion bash > ~/.local/share/bash-completion/completions/l4convert
  zsh:   l4convert completion zsh > "${fpath[1]}/_l4convert"
  fish:  l4convert completion fish > ~/.config/fish/completions/l4convert.fish
"""


@click.command("completion", epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@global_options
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell."""
    completion = get_completion_class(shell)
    assert completion is not None, shell
    root = ctx.find_root().command
    script = completion(root, {}, "l4convert", "_L4CONVERT_COMPLETE").source()
    settings_of(ctx).emit("completion", {"shell": shell, "script": script}, script)
