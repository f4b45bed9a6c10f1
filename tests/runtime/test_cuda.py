"""The file that calls CUDA and TensorRT, on modules made of Python: order of calls, errors, graphs, fallbacks.

That the names exist, in the libraries themselves, is tested too, where these are installed. None of it ran on a GPU.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.errors import DeviceError
from l4convert.gpus import Gpu
from l4convert.runtime import cuda
from l4convert.runtime.cuda import CudaDevice
from tests.runtime.fake_cuda import Code, Cuda, Engine, tensorrt

GPU = Gpu(0, "Fake", "8.9", 1 << 30)


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "decoder.plan").write_bytes(b"plan of an engine")
    return tmp_path / "decoder.plan"


def device(module: Any, library: Cuda | None = None) -> tuple[CudaDevice, Cuda]:
    library = library or Cuda()
    return CudaDevice(GPU, library, module, "1.7.1"), library


def test_memory_and_copies_go_through_one_stream() -> None:
    here, library = device(tensorrt(None))
    address = here.alloc(64)
    here.zero(address, 64)
    source = np.arange(8)
    here.copy_in(address, source)
    here.copy_out(address, (2, 4), np.dtype(np.int64))
    here.free(address)
    here.close()
    assert library.names == [
        "cudaSetDevice",
        "cudaStreamCreateWithFlags",
        "cudaMalloc",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaFree",
        "cudaStreamSynchronize",
        "cudaStreamDestroy",
    ]
    assert library.calls[4] == ("cudaMemcpyAsync", 4096, source.ctypes.data, 64, 1, 77)
    assert library.calls[5][2:] == (4096, 64, 2, 77)
    assert here.free_bytes() == 1000


def test_an_error_of_cuda_names_the_function_and_the_gpu() -> None:
    here, library = device(tensorrt(None))
    library.fail["cudaMalloc"] = Code.cudaErrorMemoryAllocation
    with pytest.raises(DeviceError, match=r"^Fake: cudaMalloc failed: cudaErrorMemoryAllocation$"):
        here.alloc(1)
    assert library.names[-1] == "cudaGetLastError"


def test_what_is_captured_is_launched_and_freed() -> None:
    here, library = device(tensorrt(None))
    graph = here.capture(lambda: here.zero(1, 2))
    assert graph is not None
    graph.launch()
    graph.free()
    names = ["cudaStreamBeginCapture", "cudaMemsetAsync", "cudaStreamEndCapture", "cudaGraphInstantiate"]
    assert library.names[2:] == [*names, "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy"]
    assert library.calls[-2] == ("cudaGraphLaunch", 6, 77)


@pytest.mark.parametrize("function", ["cudaMemsetAsync", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_ended_and_leaves_nothing(function: str) -> None:
    here, library = device(tensorrt(None))
    library.fail[function] = Code.cudaErrorStreamCaptureUnsupported
    assert here.capture(lambda: here.zero(1, 2)) is None
    assert library.names.count("cudaStreamBeginCapture") == library.names.count("cudaStreamEndCapture") == 1
    assert library.names.count("cudaGraphDestroy") == (function != "cudaStreamEndCapture")


def test_a_plan_that_cannot_be_loaded_says_what_tensorrt_said(plan_file: Path) -> None:
    here, _ = device(tensorrt(None))
    with pytest.raises(DeviceError, match=r"decoder\.plan cannot be loaded .*: Error Code 1: wrong magic$") as caught:
        here.load(plan_file)
    assert caught.value.hint is None
    other = CudaDevice(GPU, Cuda(), tensorrt(None), "1.6.0")
    with pytest.raises(DeviceError, match=r"built with 1\.6\.0, here is 1\.7\.1") as caught:
        other.load(plan_file)
    assert caught.value.hint is not None


def test_plugins_are_loaded_before_any_engine() -> None:
    module = tensorrt(Engine([]), rtx=False)
    CudaDevice(GPU, Cuda(), module, "10.14", Path("/lib/plugins.so"))
    assert module.loaded_plugins == ["/lib/plugins.so"]
    with pytest.raises(DeviceError, match=r"^Fake: absent\.so cannot be loaded: Unable to open it$"):
        CudaDevice(GPU, Cuda(), module, "10.14", Path("absent.so"))


def test_a_context_a_profile_with_shared_scratch(plan_file: Path) -> None:
    engine = Engine([])
    here, _ = device(tensorrt(engine))
    plan = here.load(plan_file, replay=frozenset({1}))
    assert plan.scratch_bytes == 1234
    plan.use_scratch(512, 1234)
    for profile, context in enumerate(engine.contexts):
        assert context.done == [("set_optimization_profile_async", profile, 77), ("set_device_memory", 512, 1234)]
        assert context.config.cuda_graph_strategy == ("whole" if profile == 1 else "off")
    assert [plan.replayed(profile) for profile in (0, 1)] == [False, True]


def test_a_call_is_bound_and_enqueued(plan_file: Path) -> None:
    engine = Engine([])
    here, _ = device(tensorrt(engine))
    plan = here.load(plan_file)
    plan.bind(1, {"input_ids": (1, 2)}, {"input_ids": 4096, "logits": 8192})
    plan.enqueue(1)
    plan.enqueue(1)
    done = [call for call in engine.contexts[1].done if call[0] != "set_optimization_profile_async"]
    assert done == [
        ("set_input_shape", "input_ids", (1, 2)),
        ("set_tensor_address", "input_ids", 4096),
        ("set_tensor_address", "logits", 8192),
        ("execute_async_v3", 77),
        ("execute_async_v3", 77),
    ]


def test_without_graphs_where_a_replayed_call_fails(plan_file: Path) -> None:
    engine = Engine([False])
    here, _ = device(tensorrt(engine))
    plan = here.load(plan_file, replay=frozenset({1}))
    plan.use_scratch(512, 1234)
    plan.bind(1, {"input_ids": (1, 1)}, {"logits": 8192})
    plan.enqueue(1)
    again = engine.contexts[2]
    assert not plan.replayed(1)
    assert again.config.cuda_graph_strategy == "off"
    assert [call[0] for call in again.done] == [
        "set_optimization_profile_async",
        "set_device_memory",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    ]


def test_a_call_that_fails(plan_file: Path) -> None:
    here, _ = device(tensorrt(Engine([False])))
    plan = here.load(plan_file)
    plan.bind(1, {}, {})
    with pytest.raises(DeviceError, match=r"decoder\.plan: a call fails: TensorRT gives no reason"):
        plan.enqueue(1)


def test_full_tensorrt_has_neither_runtime_cache_nor_replay(plan_file: Path, tmp_path: Path) -> None:
    engine = Engine([])
    here, _ = device(tensorrt(engine, rtx=False))
    plan = here.load(plan_file, replay=frozenset({1}))
    assert not plan.replayed(1)
    assert [context.config for context in engine.contexts] == ["user", "user"]
    plan.close()
    assert not (tmp_path / "cache").exists()


def test_compiled_kernels_are_kept(plan_file: Path, tmp_path: Path) -> None:
    here, _ = device(tensorrt(Engine([])))
    here.load(plan_file).close()
    (kept,) = (tmp_path / "cache" / "l4convert" / "kernels").iterdir()
    assert kept.read_bytes() == b"kernels"
    changed = kept.stat().st_mtime_ns
    here.load(plan_file).close()
    assert kept.stat().st_mtime_ns == changed


def test_names_of_cuda_exist() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    used = {name for name in _words() if re.match("cuda[A-Z]", name) or name == "cudaError_t"}
    assert len(used) > 15
    known = {
        *dir(runtime),
        *dir(runtime.cudaError_t),
        *dir(runtime.cudaMemcpyKind),
        *dir(runtime.cudaStreamCaptureMode),
    }
    assert used <= known


def test_names_of_tensorrt_rtx_exist() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert {"USER_MANAGED"} <= trt.ExecutionContextAllocationStrategy.__members__.keys()
    assert {"WHOLE_GRAPH_CAPTURE", "DISABLED"} <= trt.CudaGraphStrategy.__members__.keys()
    owners = {
        trt.Runtime: {"deserialize_cuda_engine"},
        trt.ICudaEngine: {
            "num_optimization_profiles",
            "device_memory_size_v2",
            "create_execution_context",
            "create_runtime_config",
        },
        trt.IExecutionContext: {
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
            "set_device_memory",
            "set_optimization_profile_async",
        },
        trt.IRuntimeConfig: {
            "set_execution_context_allocation_strategy",
            "cuda_graph_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        },
    }
    for owner, names in owners.items():
        assert names <= set(dir(owner))
        assert names <= set(_words()) | {"create_runtime_cache", "set_runtime_cache"}


def test_the_logger_of_tensorrt_rtx_keeps_errors(plan_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The real library refuses what is no plan; what it says goes into the error, and not to stderr."""
    trt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(DeviceError, match=r"decoder\.plan cannot be loaded .*: .*(Error|magic)"):
        CudaDevice(GPU, Cuda(), trt, trt.__version__).load(plan_file)
    assert capfd.readouterr().err == ""


def _words() -> list[str]:
    """Every attribute and string in the file."""
    nodes = list(ast.walk(ast.parse(Path(cuda.__file__).read_text())))
    attributes = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return attributes + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
