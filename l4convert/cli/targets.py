"""``l4convert targets``: what an artifact can be made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from l4convert.cli._render import size, table
from l4convert.cli._settings import global_options, settings_of

if TYPE_CHECKING:
    from l4convert.targets.hardware import Hardware

EPILOG = """\b
Examples:
  l4convert targets
  l4convert convert CKPT --output OUT --target portable
  l4convert build OUT --target rtx-5090
"""


@click.command("targets", epilog=EPILOG)
@global_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the targets of `convert --target`, and the hardware of `build --target`."""
    from l4convert.targets import TARGETS
    from l4convert.targets.hardware import hardware_names, load_hardware

    rows = [(t.name, ", ".join(t.kv_caches), ", ".join(t.compute), t.summary) for t in TARGETS.values()]
    payload = [
        {"name": t.name, "summary": t.summary, "kv_caches": list(t.kv_caches), "compute": list(t.compute)}
        for t in TARGETS.values()
    ]
    text = table(["target", "KV caches", "computes in", "what it is"], rows)
    hardware = [load_hardware(name) for name in hardware_names()]
    headers = ["hardware", "SM", "memory", "bandwidth", "engines", "recipe", "what it is"]
    machines = table(headers, [_row(h) for h in hardware], right=(2, 3))
    payload_of_all = {"targets": payload, "hardware": [h.as_dict() for h in hardware]}
    settings_of(ctx).emit("targets", payload_of_all, f"{text}\n\n{machines}")


def _row(hardware: Hardware) -> tuple[str, ...]:
    memory, bandwidth = hardware.memory_bytes, hardware.bandwidth_bytes_per_second
    return (
        hardware.name,
        hardware.compute_capability or "-",
        "-" if memory is None else size(memory),
        "-" if bandwidth is None else f"{size(bandwidth)}/s",
        ", ".join(hardware.runtimes) or "none",
        hardware.recipe,
        hardware.summary,
    )
