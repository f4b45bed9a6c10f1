"""What ``doctor`` says of GPUs: what the driver finds, and which of the libraries that use one are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from l4convert.cli._render import size

if TYPE_CHECKING:
    from l4convert.gpus import Gpus

# What it is called -> the distributions that contain it, one for each CUDA version.
LIBRARIES = {
    "TensorRT-RTX": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "TensorRT": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    "cuda-python": ("cuda-bindings",),
}


def gpu_report(find: Callable[[], Gpus] | None = None) -> dict[str, Any]:
    """Driver, devices and libraries, as plain values.

    Args:
        find: Finds GPUs; default: asks the CUDA driver.
    """
    from l4convert.gpus import find_gpus

    found = (find or find_gpus)()
    return {
        "driver": found.driver,
        "devices": [asdict(device) for device in found.devices],
        "problem": found.problem,
        "libraries": {name: _installed(names) for name, names in LIBRARIES.items()},
    }


def gpu_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The same as rows of a name and a text."""
    rows = [
        (
            f"GPU {gpu['index']}",
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {size(gpu['memory'])}",
        )
        for gpu in report["devices"]
    ]
    driver = "" if report["driver"] is None else f" (CUDA driver {report['driver']})"
    libraries = ", ".join(f"{name} {found or 'absent'}" for name, found in report["libraries"].items())
    problem = report["problem"]
    none = "no GPU: no CUDA driver" if problem == "no CUDA driver" else f"{problem}{driver}"
    return [
        *(rows or [("GPU", none)]),
        *([("CUDA driver", report["driver"])] if rows else []),
        ("for engines", libraries),
    ]


def plugin_report() -> dict[str, Any]:
    """The plugin library for engines of the target tensorrt, where `build` looks for it; as plain values."""
    from l4convert.errors import L4Error
    from l4convert.plugins.library.native import DEFAULT_LIBRARY, load

    report: dict[str, Any] = {"path": str(DEFAULT_LIBRARY), "version": None, "sms": [], "problem": None}
    if not DEFAULT_LIBRARY.is_file():
        return {**report, "problem": "absent; l4convert plugins build makes it"}
    try:
        library = load(DEFAULT_LIBRARY)
    except L4Error as error:
        return {**report, "problem": error.message}
    return {**report, "version": library.version, "sms": list(library.sms)}


def plugin_text(report: dict[str, Any]) -> str:
    """The same on one line."""
    if report["problem"] is not None:
        return str(report["problem"])
    return f"{report['path']}, by l4convert {report['version']}, for SM {', '.join(map(str, report['sms']))}"


def _installed(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
