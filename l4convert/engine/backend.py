"""The two builders, TensorRT-RTX and TensorRT: one Python interface, two modules, both optional."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from l4convert.engine.device import present_capabilities
from l4convert.errors import INSTALL, BackendMissing, UsageError, backend_missing
from l4convert.targets.hardware import Hardware

#: Target of an artifact -> module that builds its engines.
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}

# TensorRT's own way to build where there is no GPU (trtexec --cpuOnly sets it): read when a builder is made. No public
# interface stands for it as of 11.3 (TensorRT Edge-LLM, remoteAutoTuningUtils). TensorRT-RTX does not need it.
_OPTIONS_VARIABLE = "TRT_INTERNAL_OPTIONS"
_CPU_ONLY = "--cpu_only=1"


@dataclass(frozen=True)
class Backend:
    """A builder that loads.

    Attributes:
        name: Of the module.
        version: As the module says it.
        module: ``tensorrt_rtx`` or ``tensorrt``.
    """

    name: str
    version: str
    module: Any

    def as_dict(self) -> dict[str, str]:
        """What a manifest says of it."""
        return {"name": self.name, "version": self.version}


def load_backend(target: str) -> Backend:
    """Import the builder of a target.

    Raises:
        BackendMissing: It is not installed, or does not load; the message is the install command.
    """
    name = MODULES[target]
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except ModuleNotFoundError as error:
        raise backend_missing(name) from error
    except Exception as error:  # bindings without their library: OSError, RuntimeError, AttributeError ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BackendMissing(f"{name} does not load ({reason}): {INSTALL[name]}") from error
    if name == "tensorrt" and not present_capabilities():
        _allow_no_gpu()
    return Backend(name, version, module)


def require_capability(backend: Backend, hardware: Hardware) -> None:
    """Refuse a GPU that this builder cannot build for from here.

    TensorRT-RTX builds for any compute capability that it knows. TensorRT (10.14's headers know no such setting)
    builds for the GPU that the machine has.

    Raises:
        UsageError: It cannot.
    """
    if _capability(backend, hardware.sm) is not None:
        return
    found = present_capabilities()
    if hardware.compute_capability in found and not hasattr(backend.module, "ComputeCapability"):
        return
    where = f"this machine's GPUs have {', '.join(found)}" if found else "this machine has no GPU"
    raise UsageError(
        f"{hardware.name}: {backend.name} {backend.version} cannot build for compute capability"
        f" {hardware.compute_capability} here ({where})",
        "build on a machine with that GPU, or for a GPU that tensorrt_rtx knows (`l4convert targets`)",
    )


def set_capability(backend: Backend, config: Any, sm: int) -> None:
    """Let a builder's configuration target one compute capability (89 for 8.9), where it can be chosen."""
    capability = _capability(backend, sm)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)


def _capability(backend: Backend, sm: int) -> Any:
    return getattr(getattr(backend.module, "ComputeCapability", None), f"SM{sm}", None)


def _allow_no_gpu() -> None:
    options = os.environ.get(_OPTIONS_VARIABLE, "").split()
    if _CPU_ONLY not in options:
        os.environ[_OPTIONS_VARIABLE] = " ".join([*options, _CPU_ONLY])
