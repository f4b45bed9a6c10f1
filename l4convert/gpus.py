"""Which GPUs are here, asked of the CUDA driver itself: nothing has to be installed for that."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# CUdevice_attribute of the driver API (cuda.h); the numbers are part of its binary interface.
_MAJOR, _MINOR = 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: Its number, as CUDA counts (``CUDA_VISIBLE_DEVICES`` is honoured).
        name: What its maker calls it.
        compute_capability: "8.9" and the like.
        memory: Bytes in all.
    """

    index: int
    name: str
    compute_capability: str
    memory: int


@dataclass(frozen=True)
class Gpus:
    """What the driver says.

    Attributes:
        driver: The newest CUDA version that the driver runs, such as "13.0"; None where there is no driver.
        devices: Every GPU that this process may use.
        problem: Why there is none, in one line; None where there is one.
    """

    driver: str | None
    devices: tuple[Gpu, ...]
    problem: str | None


def find_gpus(load: Callable[[], Any] | None = None) -> Gpus:
    """Ask the CUDA driver for its version and its GPUs.

    Args:
        load: Gives the driver's library, raises ``OSError`` where there is none. Default: the system's own.
    """
    try:
        library = (load or _driver)()
    except OSError:
        return Gpus(None, (), "no CUDA driver")
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    code = int(library.cuInit(0))
    if code:
        return Gpus(driver, (), "no GPU" if code == _NO_DEVICE else f"the CUDA driver does not start (error {code})")
    devices = tuple(_devices(library))
    return Gpus(driver, devices, None if devices else "no GPU")


def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _devices(library: Any) -> Iterator[Gpu]:
    count = ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        major, minor = (_attribute(library, device, number) for number in (_MAJOR, _MINOR))
        yield Gpu(index, name.value.decode(errors="replace"), f"{major}.{minor}", memory.value)


def _attribute(library: Any, device: ctypes.c_int, attribute: int) -> int:
    value = ctypes.c_int()
    library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
