"""Which hardware profile a GPU has, for building its engines."""

from __future__ import annotations

import json
import re
from pathlib import Path

from l4convert.gpus import Gpu
from l4convert.targets.hardware import hardware_names, load_hardware


class Unfit(Exception):
    """Why a row cannot run on this GPU, in one line."""


def hardware_for(gpu: Gpu, runtime: str, work: Path) -> str:
    """The bundled hardware profile of a GPU, or a file with one made of what the driver says.

    Raises:
        Unfit: Its kind of GPU has no such runtime.
    """
    alike = [load_hardware(name) for name in hardware_names()]
    alike = [profile for profile in alike if profile.compute_capability == gpu.compute_capability]
    if alike and not any(runtime in profile.runtimes for profile in alike):
        raise Unfit(f"{runtime} has no engines for compute capability {gpu.compute_capability}")
    words = set(re.findall(r"[a-z0-9]+", gpu.name.lower()))
    named = [profile for profile in alike if words >= set(profile.name.split("-"))]
    if chosen := [profile.name for profile in (*named, *alike) if runtime in profile.runtimes]:
        return chosen[0]
    file = work / f"{slug(gpu.name)}.toml"
    precisions = ["fp32", "fp16", "bf16", "int8", "int4", *(["fp8"] if capability(gpu) >= (8, 9) else [])]
    file.write_text(
        f'summary = "{gpu.name}"\ncompute_capability = "{gpu.compute_capability}"\nmemory_bytes = {gpu.memory}\n'
        # What the driver does not say, and nothing here depends on.
        f'bandwidth_bytes_per_second = 1\nprecisions = {json.dumps(precisions)}\nruntimes = ["{runtime}"]\n'
        'recipe = "int4"\n'
    )
    return str(file)


def capability(gpu: Gpu) -> tuple[int, ...]:
    """8.9 as (8, 9), to be compared."""
    return tuple(int(part) for part in gpu.compute_capability.split("."))


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA GeForce RTX 5090" -> "geforce-rtx-5090"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
