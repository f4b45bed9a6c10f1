"""What the shell offers for the value of an option. It must never fail and never be slow, so most lists are plain."""

from __future__ import annotations

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def one_of(*names: str) -> Completer:
    """Offer fixed names, and files where none fits."""

    def complete(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        fitting = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return fitting or [CompletionItem(incomplete, type="file")]

    return complete


def target_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the rows of the table of targets."""
    from l4convert.targets import TARGETS

    return [
        CompletionItem(name, help=target.summary) for name, target in TARGETS.items() if name.startswith(incomplete)
    ]
