"""Defaults from a TOML file: top-level keys for global options, one table a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4convert.errors import InputError, UsageError
from l4convert.toml_file import read_toml

DEFAULT_FILE = "l4convert.toml"


def find_config() -> Path | None:
    """``l4convert.toml`` of the current folder, where there is one."""
    path = Path(DEFAULT_FILE)
    return path if path.is_file() else None


def load_config(path: Path, group: click.Group, ctx: click.Context) -> dict[str, Any]:
    """Read a file into the form of click's ``default_map``: option name -> value, command name -> such a map.

    Raises:
        UsageError: The file cannot be read, is not TOML, or has a key that is no option (a typo must not be silent).
    """
    try:
        data = read_toml(path)
    except InputError as error:
        raise UsageError(error.message, "give --config the path of a TOML file") from error
    result: dict[str, Any] = {}
    for key, value in data.items():
        if not isinstance(value, dict):
            result |= _options(path, {key: value}, group, "")
        elif (command := group.get_command(ctx, key)) is not None:
            result[key] = _options(path, value, command, f"[{key}] ")
        else:
            raise UsageError(f"{path}: [{key}] is not a command", f"commands: {', '.join(group.list_commands(ctx))}")
    return result


def _options(path: Path, values: dict[str, Any], command: click.Command, where: str) -> dict[str, Any]:
    """``values`` with keys as click names them; ``max-new-tokens`` and ``max_new_tokens`` are the same key.

    A table in the table of a group is one of the group's commands: ``[plugins.build]``.
    """
    known = {param.name for param in command.params if isinstance(param, click.Option)} - {"config", "version"}
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(command, click.Group) and isinstance(value, dict) and key in command.commands:
            result[key] = _options(path, value, command.commands[key], f"{where.rstrip('] ')}.{key}] ")
            continue
        name = key.replace("-", "_")
        if name not in known:
            options = ", ".join(sorted(str(option).replace("_", "-") for option in known))
            raise UsageError(f"{path}: {where}{key} is not an option", f"options here: {options}")
        result[name] = value
    return result
