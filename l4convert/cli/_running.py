"""The options of every command that runs an artifact: what is to run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from l4convert.cli._complete import hardware_names

if TYPE_CHECKING:
    from l4convert.runtime import EngineSession, OrtSession

Command = TypeVar("Command", bound=Callable[..., Any])


def running_options(command: Command) -> Command:
    """Add ``--engine NAME``, ``--provider NAME`` and ``--plugins FILE``, which become arguments of these names."""
    engine = click.option(
        "--engine",
        metavar="NAME",
        shell_complete=hardware_names,
        help="Run the engine that `build` made for this hardware profile, on the first GPU.",
    )
    provider = click.option(
        "--provider", type=click.Choice(["cpu", "cuda"]), help="ONNX Runtime's execution provider.  [default: cpu]"
    )
    plugins = click.option(
        "--plugins",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The engine's plugin library, if it was moved since `build`.",
    )
    return engine(provider(plugins(command)))


def remarks(runner: OrtSession | EngineSession) -> tuple[str, ...]:
    """What a reader should know of how an engine ran; nothing of ONNX Runtime."""
    from l4convert.runtime import EngineSession

    return (f"{runner.name}; {runner.graphs}",) if isinstance(runner, EngineSession) else ()
