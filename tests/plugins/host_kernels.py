"""The kernels of ``benchmarks/gpu_library.py`` on host memory: the real library over the stand-in for CUDA's driver."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.benchmarks.scripts import load
from tests.plugins.stand_in import StandIn

library = load("gpu_library")
plugins = load("gpu_plugins")


class HostBuffer:
    """A torch tensor's memory as the stand-in looks accesses up in it."""

    count = False

    def __init__(self, tensor: Any, name: str) -> None:
        self.nbytes, self.name, self.loads = tensor.numel() * tensor.element_size(), name, np.zeros(0, np.uint16)
        self.address = tensor.data_ptr()
        self.end = self.address + self.nbytes

    def guarded(self) -> bool:
        return True


class OnHost:
    """Every call runs on the stand-in, whose memory is that of the call's tensors."""

    def __init__(self, gpu: StandIn) -> None:
        super().__init__(torch, gpu.library.path, "cpu", gpu.sm, gpu.multiprocessors)  # type: ignore[call-arg]
        self.gpu = gpu

    def _call(self, enqueue: Any, held: tuple[Any, ...]) -> Any:
        run = super()._call(enqueue, held)  # type: ignore[misc]

        def call() -> None:
            tensors = {tensor.data_ptr(): tensor for tensor in held if tensor is not None}
            buffers = [self.gpu.memory.add(HostBuffer(tensor, "a tensor")) for tensor in tensors.values()]  # type: ignore[arg-type]
            try:
                self.gpu.call(run)
            finally:
                for buffer in buffers:
                    self.gpu.memory.free(buffer)

        return call


class HostKernels(OnHost, library.Kernels):  # type: ignore[misc, name-defined]
    """Through the library's C interface."""


class HostPluginKernels(OnHost, plugins.PluginKernels):  # type: ignore[misc, name-defined]
    """Through the TensorRT plugins."""
