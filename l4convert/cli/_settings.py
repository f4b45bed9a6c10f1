"""What every command shares: the global options, where results go, and whether progress is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from l4convert.cli._config import find_config, load_config
from l4convert.progress import NO_PROGRESS, Progress, terminal_progress

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """The global options, filled while the command line is parsed; they may stand before and after the command."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    config: Path | None = None

    def progress(self) -> Progress:
        """Bars on stderr where that is a terminal and the user did not ask for quiet."""
        return NO_PROGRESS if self.quiet else terminal_progress()

    def emit(self, command: str, payload: Mapping[str, Any], text: str, *, summary: bool = False) -> None:
        """Write a command's result to stdout.

        Args:
            command: Names the schema, ``l4convert.<command>/1``.
            payload: The result for ``--json``, the same facts as ``text``; may name a schema of its own.
            text: The result for people.
            summary: The text only tells that work was done, so ``--quiet`` drops it.
        """
        if self.json:
            click.echo(json.dumps({"schema": f"l4convert.{command}/1", **payload}, indent=2))
        elif not (summary and self.quiet):
            click.echo(text)

    def note(self, text: str) -> None:
        """Tell a person at a terminal something that is no result; on stderr, and not when quiet."""
        if not self.quiet and sys.stderr.isatty():
            click.echo(text, err=True)


def settings_of(ctx: click.Context) -> Settings:
    """The settings of the running command line."""
    return ctx.find_root().ensure_object(Settings)


def _set_flag(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        setattr(settings_of(ctx), str(param.name), True)


def _set_config(ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    """Install the file as click's defaults. Eager, so that it is there before any other option is looked up."""
    root = ctx.find_root()
    path = value if value is not None or ctx is not root else find_config()
    if path is None or ctx.resilient_parsing:  # the latter: shell completion, which must not fail
        return
    assert isinstance(root.command, click.Group)
    settings = settings_of(ctx)
    settings.config = path
    root.default_map = load_config(path, root.command, root)
    if ctx is not root:  # given after the command's name, when the group's own options have been dealt with
        ctx.default_map = root.default_map.get(str(ctx.info_name))
        for name in ("json", "quiet", "verbose", "debug"):
            if root.default_map.get(name) is True:
                setattr(settings, name, True)


def global_options(function: F) -> F:
    """Decorator: the options that the group and every command take."""
    flags = [
        ("--json", "Print the result as JSON with a versioned schema."),
        ("-q/--quiet", "No progress and no summary; errors and requested results only."),
        ("-v/--verbose", "More detail."),
        ("--debug", "Show the traceback of an error."),
    ]
    config = click.option(
        "--config",
        type=click.Path(path_type=Path),
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_set_config,
        help="TOML file with defaults, one table a command.  [default: l4convert.toml here, if it exists]",
    )
    for names, text in reversed(flags):
        flag = click.option(*names.split("/"), is_flag=True, expose_value=False, callback=_set_flag, help=text)
        function = flag(function)
    return config(function)
