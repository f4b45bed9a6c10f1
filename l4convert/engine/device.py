"""Which NVIDIA GPUs this machine has, asked of the driver itself: no CUDA package is needed."""

from __future__ import annotations

import ctypes

# Numbers of CUdevice_attribute (cuda.h).
_MAJOR, _MINOR = 75, 76


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities ("8.9") of the GPUs of this machine; empty where there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(f"{_attribute(driver, _MAJOR, i)}.{_attribute(driver, _MINOR, i)}" for i in range(count.value))


def _attribute(driver: ctypes.CDLL, attribute: int, device: int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
