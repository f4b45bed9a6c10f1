"""The library's driver code and the harness itself, on a demonstration kernel."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

from l4convert.plugins.library import native
from tests.plugins.conftest import DEMO
from tests.plugins.interpreter import DeviceBuffer
from tests.plugins.stand_in import StandIn

BF16 = ml_dtypes.bfloat16


class Product:
    """Buffers of y = x @ (codes * scales) + bias, and the result that NumPy computes."""

    def __init__(self, gpu: StandIn, rows: int = 21, depth: int = 64, columns: int = 64) -> None:
        random = np.random.default_rng(0)
        self.rows, self.depth, self.columns = rows, depth, columns
        x = random.standard_normal((rows, depth)).astype(BF16)
        codes = random.integers(-8, 8, (depth, columns), np.int8)
        scales = random.uniform(0.01, 0.1, columns).astype(np.float32)
        weights = (codes * scales).astype(BF16).astype(np.float32)
        self.expected = (x.astype(np.float32) @ weights + np.float32(0.5)).astype(BF16)
        self.x, self.codes, self.scales = gpu.upload(x), gpu.upload(codes, count=True), gpu.upload(scales)
        self.y = gpu.empty((rows, columns), BF16, "y")

    def arguments(self) -> list[tuple[str, DeviceBuffer | float | None]]:
        buffers: list[tuple[str, DeviceBuffer | float | None]] = [
            ("p", self.x),
            ("p", self.codes),
            ("p", self.scales),
            ("p", self.y),
        ]
        return [*buffers, ("i", self.rows), ("i", self.depth), ("f", 0.5)]

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.rows // 16), self.columns // 32, 1)


@pytest.fixture
def gpu(demo_library: native.Library, driver: ctypes.CDLL) -> StandIn:
    return StandIn(demo_library, driver, sm=90, ops=DEMO)


def test_a_kernel_runs_through_library_driver_and_interpreter(gpu):
    product = Product(gpu)
    gpu.launch("demo_c32", product.grid, product.arguments())
    np.testing.assert_array_equal(product.y.numpy().astype(np.float32), product.expected.astype(np.float32))
