"""What the shell offers for the value of an option."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def recipe_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the bundled recipes, and files where none fits."""
    from l4convert.quantization.recipe import bundled_recipes

    fitting = [CompletionItem(name) for name in bundled_recipes() if name.startswith(incomplete)]
    return fitting or [CompletionItem(incomplete, type="file")]


def target_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the rows of the table of targets; for a plan, hardware too."""
    from l4convert.targets import TARGETS

    fitting = {name: target for name, target in TARGETS.items() if name.startswith(incomplete)}
    found = [CompletionItem(name, help=target.summary) for name, target in fitting.items()]
    if ctx.command.name != "plan":
        return found
    hardware = [item for item in hardware_names(ctx, param, incomplete) if item.value not in fitting]
    return found + [item for item in hardware if not found or item.type == "plain"]


def hardware_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the bundled hardware profiles, and files where none fits."""
    from l4convert.targets import hardware

    fitting = [name for name in hardware.hardware_names() if name.startswith(incomplete)]
    found = [CompletionItem(name, help=hardware.load_hardware(name).summary) for name in fitting]
    return found or [CompletionItem(incomplete, type="file")]


def folders(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer folders."""
    return [CompletionItem(incomplete, type="dir")]


def sm_numbers(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the compute capabilities that kernels can be compiled for."""
    from l4convert.plugins.library.variants import KNOWN_SMS

    return [CompletionItem(str(sm)) for sm in KNOWN_SMS if str(sm).startswith(incomplete)]
