"""Every CUDA and TensorRT call of the runner, behind the interfaces of :mod:`l4convert.runtime.device`.

Names and signatures are those of cuda-bindings 13 (``cuda.bindings.runtime``) and of the Python modules of TensorRT-RTX
1.7 and TensorRT 10.8 or newer. No decision is taken here that could be taken elsewhere: this file runs on a GPU only.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from l4convert.errors import DeviceError, backend_missing
from l4convert.gpus import Gpu
from l4convert.runtime.device import Shape
from l4convert.runtime.kernel_cache import KernelCache


class CudaDevice:
    """A GPU, with one stream of its own.

    Args:
        gpu: Which.
        cuda: Module ``cuda.bindings.runtime``.
        trt: Module ``tensorrt_rtx`` or ``tensorrt``.
        built_with: Version of it that built the engines to load.
        plugins: The plugin library that the engines need; None for none.

    Raises:
        DeviceError: CUDA or TensorRT refuses.
    """

    def __init__(self, gpu: Gpu, cuda: Any, trt: Any, built_with: str, plugins: Path | None = None) -> None:
        self._gpu = gpu
        self._cuda = cuda
        self._trt = trt
        self._built_with = built_with
        self._sources: list[npt.NDArray[Any]] = []  # arrays that a copy may still read
        self.call("cudaSetDevice", gpu.index)
        (self._stream,) = self.call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        if plugins is not None and self._runtime.get_plugin_registry().load_library(str(plugins)) is None:
            raise self.failed(f"{plugins} cannot be loaded")

    @classmethod
    def open(cls, gpu: Gpu, module: str, built_with: str, plugins: Path | None = None) -> Self:
        """Begin to use a GPU.

        Args:
            gpu: Which.
            module: ``tensorrt_rtx`` or ``tensorrt``.
            built_with: Version of it that built the engines to load.
            plugins: The plugin library that they need; None for none.

        Raises:
            BackendMissing: cuda-python or that module is not installed.
            DeviceError: CUDA refuses.
        """
        return cls(gpu, _module("cuda.bindings.runtime", "cuda"), _module(module, module), built_with, plugins)

    @property
    def name(self) -> str:
        return self._gpu.name

    @property
    def compute_capability(self) -> str:
        return self._gpu.compute_capability

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the CUDA runtime; give what it returns after its error code.

        Raises:
            DeviceError: It failed.
        """
        code, *values = getattr(self._cuda, function)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            _, text = self._cuda.cudaGetErrorString(code)
            self._cuda.cudaGetLastError()  # so that it is not reported again by a call that has nothing to do with it
            raise DeviceError(f"{self.name}: {function} failed: {text.decode(errors='replace')}")
        return tuple(values)

    def failed(self, what: str, hint: str | None = None) -> DeviceError:
        """The error for a call of TensorRT that failed, with what it logged."""
        return DeviceError(f"{self.name}: {what}: {self._log.last or 'TensorRT gives no reason'}", hint)

    def free_bytes(self) -> int:
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def alloc(self, nbytes: int) -> int:
        (address,) = self.call("cudaMalloc", nbytes)
        return int(address)

    def free(self, address: int) -> None:
        self.call("cudaFree", address)

    def zero(self, address: int, nbytes: int) -> None:
        self.call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy_in(self, address: int, array: npt.NDArray[Any]) -> None:
        # Kept until the stream was waited for: some systems read the host's memory only when the copy runs.
        self._sources.append(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def copy_out(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        array = np.empty(shape, dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)
        self.wait()
        return array

    def load(self, file: Path, *, replay: frozenset[int] = frozenset()) -> TensorRtPlan:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            here = self._trt.__version__
            hint = None if here == self._built_with else "Install that version, or run `l4convert build` again."
            what = f"{file} cannot be loaded (built with {self._built_with}, here is {here})"
            raise self.failed(what, hint)
        return TensorRtPlan(self, self._trt, engine, file, replay)

    def capture(self, work: Callable[[], None]) -> CudaGraph | None:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self._stream, mode)
        failure: DeviceError | None = None
        try:
            work()
        except DeviceError as error:
            failure = error
        try:
            (graph,) = self.call("cudaStreamEndCapture", self._stream)
        except DeviceError:
            return None
        try:
            if failure is not None:
                return None
            (executable,) = self.call("cudaGraphInstantiate", graph, 0)
        except DeviceError:
            return None
        finally:
            self.call("cudaGraphDestroy", graph)
        return CudaGraph(self, executable)

    def wait(self) -> None:
        self.call("cudaStreamSynchronize", self._stream)
        self._sources.clear()

    def close(self) -> None:
        with suppress(DeviceError):  # a stream after a fault cannot be waited for, and is gone all the same
            self.wait()
        with suppress(DeviceError):
            self.call("cudaStreamDestroy", self._stream)


class CudaGraph:
    """A graph that was captured from a device's stream, and runs on it."""

    def __init__(self, device: CudaDevice, executable: Any) -> None:
        self._device = device
        self._executable = executable

    def launch(self) -> None:
        self._device.call("cudaGraphLaunch", self._executable, self._device.stream)

    def free(self) -> None:
        self._device.call("cudaGraphExecDestroy", self._executable)


class TensorRtPlan:
    """A deserialized engine with an execution context a profile, so that none is ever switched.

    Args:
        device: Where it was loaded; ``trt``: the module; ``engine``: its ``ICudaEngine``; ``file``: for messages.
        replay: Profiles whose calls TensorRT-RTX is to capture and replay itself.
    """

    def __init__(self, device: CudaDevice, trt: Any, engine: Any, file: Path, replay: frozenset[int]) -> None:
        self._device = device
        self._trt = trt
        self._engine = engine
        self._file = file
        self._scratch = (0, 0)
        self._kernels = KernelCache.of(file, device.name) if hasattr(trt, "CudaGraphStrategy") else None
        self._bound: dict[int, tuple[Mapping[str, Shape], Mapping[str, int]]] = {}
        self._replayed = replay if self._kernels is not None else frozenset()
        self._contexts = [self._context(profile) for profile in range(engine.num_optimization_profiles)]

    @property
    def scratch_bytes(self) -> int:
        return int(self._engine.device_memory_size_v2)

    def use_scratch(self, address: int, nbytes: int) -> None:
        self._scratch = (address, nbytes)
        for context in self._contexts:
            context.set_device_memory(address, nbytes)

    def bind(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        self._bound[profile] = (shapes, addresses)
        context = self._contexts[profile]
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._device.failed(f"{self._file}: refuses {name} of shape {list(shape)}")
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._device.failed(f"{self._file}: has no tensor {name}")

    def enqueue(self, profile: int) -> None:
        if self._contexts[profile].execute_async_v3(self._device.stream):
            return
        if profile not in self._replayed:
            raise self._device.failed(f"{self._file}: a call fails")
        # It may be the graph that cannot be captured: once more without. A call that is repeated writes the same slots.
        self._replayed -= {profile}
        self._contexts[profile] = self._context(profile)
        self._contexts[profile].set_device_memory(*self._scratch)
        self.bind(profile, *self._bound[profile])
        self.enqueue(profile)

    def replayed(self, profile: int) -> bool:
        return profile in self._replayed

    def close(self) -> None:
        if self._kernels is not None:
            self._kernels.save()
        self._contexts.clear()
        self._engine = None

    def _context(self, profile: int) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            context = self._engine.create_execution_context(strategy)
        else:
            context = self._engine.create_execution_context(self._runtime_config(strategy, profile, self._kernels))
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise self._device.failed(f"{self._file}: no execution context for profile {profile}")
        return context

    def _runtime_config(self, strategy: Any, profile: int, kernels: KernelCache) -> Any:
        """TensorRT-RTX compiles kernels on the GPU they run on, and can replay a whole call as a CUDA graph."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs = self._trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if profile in self._replayed else graphs.DISABLED
        kernels.attach(config)
        return config


def _module(name: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise backend_missing(install) from error


def _logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps the last error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = " ".join(message.split())

    return Logger()
