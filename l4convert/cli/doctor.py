"""``l4convert doctor``: is this machine ready?"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from l4convert import __version__
from l4convert.cli._doctor_gpu import gpu_lines, gpu_report, plugin_report, plugin_text
from l4convert.cli._render import fields, size, table
from l4convert.cli._settings import global_options, settings_of
from l4convert.errors import INSTALL, BackendMissing

# Distribution -> import name, as in pyproject.toml (a test holds them together).
CORE = {
    "click": "click",
    "ml_dtypes": "ml_dtypes",
    "numpy": "numpy",
    "onnx": "onnx",
    "onnx_ir": "onnx_ir",
    "rich": "rich",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "xxhash": "xxhash",
}
EXTRAS = {
    "gpu": {"purpose": "run artifacts (validate, generate)", "packages": ("onnxruntime-gpu",)},
    "cpu": {"purpose": "the same, where onnxruntime-gpu has no wheel", "packages": ("onnxruntime",)},
    "reference": {"purpose": "the model that validate compares with", "packages": ("torch", "transformers")},
    "tensorrt-rtx": {
        "purpose": "build TensorRT-RTX engines, with no GPU, and run them",
        "packages": ("cuda-bindings", "tensorrt-rtx-cu13"),
    },
    "plugins": {
        "purpose": "build the library of GPU kernels and TensorRT plugins, with no GPU",
        "packages": ("cmake", "kernel-lens", "ninja", "triton"),
    },
    "plot": {"purpose": "draw what bench measures (bench --plot)", "packages": ("matplotlib",)},
    "hub": {"purpose": "read checkpoints on the Hugging Face Hub (hf://org/name)", "packages": ("huggingface_hub",)},
    "cluster": {"purpose": "convert on many machines (convert --cluster)", "packages": ("ray[client]",)},
}
# Each of these installs the import package `onnxruntime`; two of them overwrite each other's files.
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
REPAIR = f"pip uninstall -y {' '.join(RUNTIMES[:2])} && {INSTALL['onnxruntime']}"

COMPILED = "compiled kernels"
IN_NUMPY = "NumPy: the same bytes, but many times slower; install l4convert again where there is a C++ compiler"

EPILOG = """\b
Examples:
  l4convert doctor
  l4convert doctor --json | python -m json.tool

\b
Exit code 0 when every core package works; 5 when one does not (the message is the install command).
"""


@dataclass(frozen=True)
class Package:
    """One distribution: installed in which version, or None; and what is wrong with it, or None."""

    name: str
    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Extra:
    """An optional feature; ``install`` is the command that adds it, None when it is there or must not be added."""

    name: str
    purpose: str
    packages: tuple[Package, ...]
    install: str | None


@click.command("doctor", epilog=EPILOG)
@global_options
@click.pass_context
def command(ctx: click.Context) -> None:
    """Report on this machine: Python, memory, disk, GPUs, packages, and what is missing."""
    core = [_core_package(name, module) for name, module in CORE.items()]
    extras = [_extra(name) for name in EXTRAS]
    runtime = _runtime()
    system = _system()
    gpu = gpu_report()
    plugins = plugin_report()
    problems = [f"{p.name}: {p.problem}" for p in core if p.problem] + runtime["problems"]
    broken = [p.name for p in core if p.problem]
    payload = {
        "ok": not broken and not runtime["broken"],
        "system": system,
        "core": [asdict(package) for package in core],
        "extras": [asdict(extra) for extra in extras],
        "onnxruntime": {key: runtime[key] for key in ("installed", "providers")},
        "gpu": gpu,
        "plugins": plugins,
        "problems": problems,
    }
    settings_of(ctx).emit("doctor", payload, _text(system, core, extras, runtime, gpu, plugins, problems))
    if broken:
        raise BackendMissing(f"{', '.join(broken)} cannot be used: pip install --force-reinstall {' '.join(broken)}")
    if runtime["broken"]:
        raise BackendMissing(f"onnxruntime cannot be used: {REPAIR}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _core_package(name: str, module: str) -> Package:
    """Imports it, for a package may be installed and still not load."""
    found = _installed(name)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it is, the user needs to know
        return Package(name, found, f"{type(error).__name__}: {error}")
    return Package(name, found)


def _extra(name: str) -> Extra:
    packages = tuple(Package(package, _installed(package.partition("[")[0])) for package in EXTRAS[name]["packages"])
    present = all(package.version for package in packages)
    harmful = packages[0].name in RUNTIMES and any(_installed(runtime) for runtime in RUNTIMES)
    install = None if present or harmful else f"pip install {' '.join(package.name for package in packages)}"
    return Extra(name, str(EXTRAS[name]["purpose"]), packages, install)


def _runtime() -> dict[str, Any]:
    """Which builds of ONNX Runtime are installed, what the one that loads can use, and what is wrong."""
    installed = {name: found for name in RUNTIMES if (found := _installed(name))}
    result: dict[str, Any] = {"installed": installed, "providers": [], "problems": [], "broken": False}
    if len(installed) > 1:
        names = " and ".join(installed)
        result["problems"].append(f"{names} are both installed and overwrite each other: {REPAIR}")
    if not installed:
        return result
    try:
        result["providers"] = importlib.import_module("onnxruntime").get_available_providers()
    except Exception as error:
        result["problems"].append(f"onnxruntime: {type(error).__name__}: {error}")
        result["broken"] = True
    return result


def _system() -> dict[str, Any]:
    total, available = _memory()
    return {
        "compiled_kernels": _compiled_kernels(),
        "l4convert": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": total,
        "memory_available_bytes": available,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "folder": str(Path.cwd()),
    }


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes, no more than the container (cgroup v2) allows; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None
    available = None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(rows["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in rows else None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        available = None if available is None else min(available, total)
    return total, available


def _compiled_kernels() -> bool:
    """Whether quantization runs in the compiled library; not where even NumPy does not load."""
    try:
        from l4convert.quantization import native
    except ImportError:
        return False
    return native.AVAILABLE


def _text(
    system: dict[str, Any],
    core: list[Package],
    extras: list[Extra],
    runtime: dict[str, Any],
    gpu: dict[str, Any],
    plugins: dict[str, Any],
    problems: list[str],
) -> str:
    memory = "unknown" if system["memory_bytes"] is None else size(system["memory_bytes"])
    if system["memory_available_bytes"] is not None:
        memory += f" ({size(system['memory_available_bytes'])} available)"
    lines = [
        fields(
            [
                ("l4convert", system["l4convert"]),
                ("Python", f"{system['python']} ({system['executable']})"),
                ("platform", system["platform"]),
                ("cores", system["cores"]),
                ("memory", memory),
                ("free disk", f"{size(system['disk_free_bytes'])} in {system['folder']}"),
                ("ONNX Runtime", _runtime_text(runtime)),
                ("quantization", COMPILED if system["compiled_kernels"] else IN_NUMPY),
                *gpu_lines(gpu),
                ("plugin library", plugin_text(plugins)),
            ]
        ),
        table(["core package", "version"], [(p.name, p.version or "absent") for p in core]),
        table(["extra", "for", "status"], [(e.name, e.purpose, _extra_status(e)) for e in extras]),
        "\n".join(f"problem: {problem}" for problem in problems) or "No problem found.",
    ]
    return "\n\n".join(lines)


def _extra_status(extra: Extra) -> str:
    if extra.install is not None:
        return f"absent; to add: {extra.install}"
    if all(package.version for package in extra.packages):
        return ", ".join(f"{package.name} {package.version}" for package in extra.packages)
    return "not needed: another build of ONNX Runtime is installed"


def _runtime_text(runtime: dict[str, Any]) -> str:
    if not runtime["installed"]:
        return f"absent; to add: {INSTALL['onnxruntime']}"
    builds = ", ".join(f"{name} {found}" for name, found in runtime["installed"].items())
    return f"{builds}; built with {', '.join(runtime['providers']) or 'no providers'}"
