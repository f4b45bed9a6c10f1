"""How much came over the network, in the results of commands; nothing of checkpoints that are on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from l4convert.cli._render import size

if TYPE_CHECKING:
    from pathlib import Path

    from l4convert.checkpoint.traffic import Traffic
    from l4convert.cli._settings import Settings


def network_payload(traffic: Traffic | None) -> dict[str, Any] | None:
    """The counts as JSON; None where nothing could have come."""
    if traffic is None:
        return None
    return {"bytes": traffic.nbytes, "requests": traffic.requests, "retries": traffic.retries}


def network_rows(traffic: Traffic | None) -> list[tuple[str, object]]:
    """The counts as a row of a summary."""
    if traffic is None:
        return []
    again = f", {traffic.retries:,} made again after a failure" if traffic.retries else ""
    return [("network", f"{size(traffic.nbytes)} of weight files in {traffic.requests:,} requests{again}")]


def local_folder(checkpoint: Path, settings: Settings) -> Path:
    """The folder of a CKPT that has to be on this machine; how much is to be downloaded is said before it is."""
    from l4convert.checkpoint.text import is_address

    if not is_address(checkpoint):
        return checkpoint
    from l4convert.checkpoint.hub import local_checkpoint

    def tell(text: str) -> None:
        if not settings.quiet:
            click.echo(text, err=True)

    return local_checkpoint(checkpoint, settings.progress(), tell)
