"""The command line: parse, call the library, render.

A command is imported when it is named, and what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from l4convert import __version__
from l4convert.cli._errors import drop_output, report
from l4convert.cli._settings import Settings, global_options
from l4convert.signals import raise_on_signals

# Name -> module, in the order in which a newcomer needs them. Each module has a click command called `command`.
COMMANDS = {
    "doctor": "l4convert.cli.doctor",
    "inspect": "l4convert.cli.inspect",
    "plan": "l4convert.cli.plan",
    "convert": "l4convert.cli.convert",
    "validate": "l4convert.cli.validate",
    "optimize": "l4convert.cli.optimize",
    "build": "l4convert.cli.build",
    "generate": "l4convert.cli.generate",
    "bench": "l4convert.cli.bench",
    "verify": "l4convert.cli.verify",
    "targets": "l4convert.cli.targets",
    "passes": "l4convert.cli.passes",
    "plugins": "l4convert.cli.plugins",
    "completion": "l4convert.cli.completion",
}

EPILOG = """\b
Start here:
  l4convert doctor                                    is this machine ready?
  l4convert inspect CKPT                              what is in the checkpoint?
  l4convert plan CKPT --output OUT                    how large, how long, does it fit?
  l4convert convert CKPT --output OUT --recipe int4   make the artifact
  l4convert validate OUT --reference CKPT             prove it equal to the reference
  l4convert generate OUT --prompt "def main"          use it

\b
Every option has an environment variable (L4CONVERT_CONVERT_RECIPE=fp8 for `convert --recipe fp8`), and may have a
default in a TOML file (l4convert.toml: a table [convert] with recipe = "fp8"). Flags win over variables, and
variables over the file.

\b
Exit codes: 0 done, 1 internal error, 2 usage, 3 bad input, 4 a parity or integrity check failed,
5 an optional package is missing (the message is the install command), 130 interrupted.
"""


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        command = importlib.import_module(COMMANDS[cmd_name]).command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # before click makes an anonymous exit code 1 of it
            raise click.exceptions.Exit(drop_output()) from None


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={
        "auto_envvar_prefix": "L4CONVERT",
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
    },
)
@global_options
@click.version_option(__version__, "-V", "--version", message="l4convert %(version)s")
def cli() -> None:
    """Convert Llama 4 checkpoints to quantized ONNX, and prove the result equal to the reference model."""


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code; nothing is raised."""
    settings = Settings()
    try:
        # Not standalone: click returns the code of an early exit (--help), and leaves errors to us.
        code = cli.main(args=args, prog_name="l4convert", standalone_mode=False, obj=settings)
        sys.stdout.flush()  # a broken pipe must show here, where it is handled
    except SystemExit as error:  # a signal, or how click ends after a completion request
        return error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # the one place where everything ends as an exit code
        return report(error, settings)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of ``l4convert`` and ``python -m l4convert``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # as long as the process
    raise_on_signals()
    sys.exit(run())
