"""What is said about GPUs is what the driver says; the driver here is one made of Python."""

from __future__ import annotations

import ctypes
from typing import Any

from l4convert.gpus import Gpu, Gpus, find_gpus

CARDS = [(b"NVIDIA H100 80GB HBM3", 85_000_000_000, (9, 0)), (b"NVIDIA GeForce RTX 5090", 34_000_000_000, (12, 0))]


class Driver:
    """The functions of libcuda that are called, with the types that cuda.h gives them."""

    def __init__(self, cards: list[Any], start: int = 0) -> None:
        self.cards, self.start = cards, start

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        return self._put(version, ctypes.c_int, 13020)

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.start

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        return self._put(count, ctypes.c_int, len(self.cards))

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return self._put(device, ctypes.c_int, 100 + index)

    def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:  # noqa: N802
        buffer.value = self.cards[device.value - 100][0][: size - 1]
        return 0

    def cuDeviceTotalMem_v2(self, nbytes: Any, device: Any) -> int:  # noqa: N802
        return self._put(nbytes, ctypes.c_size_t, self.cards[device.value - 100][1])

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        return self._put(value, ctypes.c_int, self.cards[device.value - 100][2][{75: 0, 76: 1}[attribute]])

    @staticmethod
    def _put(where: Any, kind: Any, value: int) -> int:
        ctypes.cast(where, ctypes.POINTER(kind))[0] = value
        return 0


def test_every_gpu_is_listed() -> None:
    h100 = Gpu(0, "NVIDIA H100 80GB HBM3", "9.0", 85_000_000_000)
    rtx = Gpu(1, "NVIDIA GeForce RTX 5090", "12.0", 34_000_000_000)
    assert find_gpus(lambda: Driver(CARDS)) == Gpus("13.2", (h100, rtx), None)


def test_no_driver() -> None:
    def absent() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert find_gpus(absent) == Gpus(None, (), "no CUDA driver")


def test_a_driver_without_gpus() -> None:
    assert find_gpus(lambda: Driver([])) == Gpus("13.2", (), "no GPU")
    assert find_gpus(lambda: Driver(CARDS, start=100)) == Gpus("13.2", (), "no GPU")
    assert find_gpus(lambda: Driver(CARDS, start=999)).problem == "the CUDA driver does not start (error 999)"
