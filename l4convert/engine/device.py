"""The compute capabilities of the GPUs that this machine has."""

from __future__ import annotations

from l4convert.gpus import find_gpus


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities ("8.9") of the GPUs of this machine; empty where there is no GPU or no driver."""
    return tuple(gpu.compute_capability for gpu in find_gpus().devices)
