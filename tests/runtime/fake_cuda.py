"""The modules ``cuda.bindings.runtime`` and ``tensorrt_rtx``, made of Python: they note what is called."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Code(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorStreamCaptureUnsupported = 900  # noqa: N815


class Cuda:
    """``cuda.bindings.runtime``: every function gives its error code first; those in ``fail`` fail."""

    cudaError_t = Code  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, Code] = {}
        self.results = {"cudaStreamCreateWithFlags": (77,), "cudaMemGetInfo": (1000, 2000), "cudaMalloc": (4096,)}
        self.results |= {"cudaStreamEndCapture": (5,), "cudaGraphInstantiate": (6,)}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == "cudaGetErrorString":
                return (Code.cudaSuccess, arguments[0].name.encode())
            code = self.fail.get(name, Code.cudaSuccess)
            nothing = (None,) * len(self.results.get(name, ()))
            return (code, *(nothing if code else self.results.get(name, ())))

        return function

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Context:
    """``IExecutionContext``; ``works``: what its calls give, in order."""

    def __init__(self, config: Any, works: list[bool]) -> None:
        self.config, self.works = config, works
        self.done: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def method(*arguments: Any) -> bool:
            self.done.append((name, *arguments))
            return self.works.pop(0) if name == "execute_async_v3" and self.works else True

        return method


class Engine:
    num_optimization_profiles = 2
    device_memory_size_v2 = 1234

    def __init__(self, works: list[bool]) -> None:
        self.works = works
        self.contexts: list[Context] = []

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: SimpleNamespace(serialize=lambda: b"kernels", deserialize=lambda blob: True),
            set_runtime_cache=lambda cache: True,
            cuda_graph_strategy=None,
        )

    def create_execution_context(self, config: Any) -> Context:
        self.contexts.append(Context(config, self.works if len(self.contexts) == 1 else []))
        return self.contexts[-1]


def tensorrt(engine: Engine | None, *, rtx: bool = True) -> Any:
    """Module ``tensorrt_rtx``, or ``tensorrt`` without what only the other has."""

    loaded: list[str] = []

    class Logger:
        Severity = SimpleNamespace(ERROR=1)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def get_plugin_registry(self) -> Any:
            def load_library(path: str) -> object | None:
                if "absent" in path:
                    self.logger.log(1, "Unable to open it")
                    return None
                loaded.append(path)
                return object()

            return SimpleNamespace(load_library=load_library)

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            assert plan[:4] == b"plan"
            if engine is None:
                self.logger.log(1, "Error Code 1:\n  wrong magic")
                self.logger.log(2, "only a warning")
            return engine

    module = SimpleNamespace(ILogger=Logger, Runtime=Runtime, __version__="1.7.1")
    module.loaded_plugins = loaded
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    if rtx:
        module.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="off")
    return module
