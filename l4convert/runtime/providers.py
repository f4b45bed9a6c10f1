"""ONNX Runtime's execution providers: which can be asked for, and whether the one that was asked for really runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, Literal

from l4convert.errors import INSTALL, BackendMissing
from l4convert.gpus import Gpus, find_gpus

Provider = Literal["cpu", "cuda"]

PROVIDERS: Mapping[Provider, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""Name for ``--provider`` -> ONNX Runtime's names, the preferred first."""


def prepare(onnxruntime: Any, provider: Provider, gpus: Callable[[], Gpus] = find_gpus) -> None:
    """Check that a provider can run here, and load what it needs.

    Args:
        onnxruntime: The module.
        provider: Which.
        gpus: Finds GPUs.

    Raises:
        BackendMissing: This build has no such provider, or there is no GPU.
    """
    if provider == "cpu":
        return
    wanted = PROVIDERS[provider][0]
    if wanted not in onnxruntime.get_available_providers():
        raise BackendMissing(f"this onnxruntime was built without {wanted}: {_REPLACE}")
    found = gpus()
    if not found.devices:
        raise BackendMissing(
            f"{found.problem} on this machine, and {wanted} runs on an NVIDIA GPU only",
            "`l4convert doctor` shows what was found; without --provider the CPU runs the artifact.",
        )
    with redirect_stdout(StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them; the system's own are looked for otherwise


def check_started(session: Any, provider: Provider) -> None:
    """Refuse a session that fell back to the CPU, as ONNX Runtime does when a library is missing.

    Raises:
        BackendMissing: It did.
    """
    wanted = PROVIDERS[provider][0]
    if wanted not in session.get_providers():
        raise BackendMissing(f"{wanted} does not start, CUDA or cuDNN may be missing: {_LIBRARIES}")


_REPLACE = f"pip uninstall -y onnxruntime && {INSTALL['onnxruntime']}"
_LIBRARIES = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
