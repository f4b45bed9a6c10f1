"""The two builders, TensorRT-RTX and TensorRT: one Python interface, two modules, both optional.

Their modules are imported by processes of their own only (worker.py, and the probe here): TensorRT-RTX 1.7.1 and ONNX
Runtime in one process make it crash when it ends.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from l4convert.engine.device import present_capabilities
from l4convert.errors import INSTALL, BackendMissing, UsageError, backend_missing

if TYPE_CHECKING:
    from l4convert.targets.hardware import Hardware

#: Target of an artifact -> module that builds its engines.
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}

# TensorRT's own way to build where there is no GPU (trtexec --cpuOnly sets it): read when a builder is made. No public
# interface stands for it as of 11.3 (TensorRT Edge-LLM, remoteAutoTuningUtils). TensorRT-RTX does not need it.
_OPTIONS_VARIABLE = "TRT_INTERNAL_OPTIONS"
_CPU_ONLY = "--cpu_only=1"

# Prints what a module is, or why it does not load: bindings without their library raise anything.
_PROBE = """
import importlib, json, sys
try:
    module = importlib.import_module(sys.argv[1])
    kinds = getattr(module, "ComputeCapability", None)
    found = {"version": str(module.__version__), "kinds": kinds and list(kinds.__members__)}
except Exception as error:
    absent = isinstance(error, ModuleNotFoundError) and error.name == sys.argv[1]
    found = {"absent": absent, "reason": f"{type(error).__name__}: {error}"}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Backend:
    """A builder that loads.

    Attributes:
        name: Of the module.
        version: As the module says it.
        capabilities: Names of the compute capabilities that it can be told to build for ("SM89"); None where it builds
            for the machine's own GPU only.
    """

    name: str
    version: str
    capabilities: frozenset[str] | None

    def as_dict(self) -> dict[str, str]:
        """What a manifest says of it."""
        return {"name": self.name, "version": self.version}


def find_backend(target: str) -> Backend:
    """Look at the builder of a target.

    Raises:
        BackendMissing: It is not installed, or does not load; the message is the install command.
    """
    name = MODULES[target]
    done = subprocess.run(  # noqa: S603  # our own interpreter and code
        [sys.executable, "-c", _PROBE, name], capture_output=True, text=True, check=False, env=import_environment()
    )
    lines = done.stdout.splitlines()
    crashed = {"absent": False, "reason": f"its import ended with code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1]) if lines and done.returncode == 0 else crashed
    if "version" not in found:
        if found["absent"]:
            raise backend_missing(name)
        raise BackendMissing(f"{name} does not load ({' '.join(found['reason'].split())}): {INSTALL[name]}")
    kinds = found["kinds"]
    return Backend(name, found["version"], None if kinds is None else frozenset(kinds))


def load_module(target: str) -> Any:
    """Import the builder of a target; for the process that builds.

    Raises:
        BackendMissing: It is not installed.
    """
    name = MODULES[target]
    if name == "tensorrt" and not present_capabilities():
        _allow_no_gpu()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise backend_missing(name) from error


def require_capability(backend: Backend, hardware: Hardware) -> None:
    """Refuse a GPU that this builder cannot build for from here.

    TensorRT-RTX builds for any compute capability that it knows. TensorRT (10.14's headers know no such setting)
    builds for the GPU that the machine has.

    Raises:
        UsageError: It cannot.
    """
    if backend.capabilities is not None and f"SM{hardware.sm}" in backend.capabilities:
        return
    found = present_capabilities()
    if backend.capabilities is None and hardware.compute_capability in found:
        return
    where = f"this machine's GPUs have {', '.join(found)}" if found else "this machine has no GPU"
    raise UsageError(
        f"{hardware.name}: {backend.name} {backend.version} cannot build for compute capability"
        f" {hardware.compute_capability} here ({where})",
        "build on a machine with that GPU, or for a GPU that tensorrt_rtx knows (`l4convert targets`)",
    )


def set_capability(module: Any, config: Any, sm: int) -> None:
    """Let a builder's configuration target one compute capability (89 for 8.9), where it can be chosen."""
    capability = getattr(getattr(module, "ComputeCapability", None), f"SM{sm}", None)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)


def import_environment() -> dict[str, str]:
    """For a child process: what this process can import it can, too, wherever it was found."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _allow_no_gpu() -> None:
    options = os.environ.get(_OPTIONS_VARIABLE, "").split()
    if _CPU_ONLY not in options:
        os.environ[_OPTIONS_VARIABLE] = " ".join([*options, _CPU_ONLY])
