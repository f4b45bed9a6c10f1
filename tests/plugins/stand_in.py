"""A GPU for tests: the real plugin library, with a driver beneath it that runs Triton's source in its interpreter.

The library asks for ``libcuda.so.1``; :class:`StandIn` compiled one from ``libcuda.c`` and loaded it first, so the
library's ``dlopen`` finds that. A launch comes back here as an image, a symbol and the address of its arguments; the
library's own table says which kernel with which constants that is and what types the arguments have. So the C++ code
that plans a call, its arguments and their order, the workspace and the kernels are all tested as they are.

    gpu = StandIn(library, sm=90, multiprocessors=4)
    x = gpu.upload(array)                        # a DeviceBuffer; bfloat16 and float8 arrays are ml_dtypes'
    y = gpu.empty((tokens, hidden), ml_dtypes.bfloat16)
    gpu.moe(native.Moe(...), tokens, x=x, router_logits=logits, gate_up=..., y=y)   # workspace is added, and checked
    gpu.attention(native.Attention(...), native.AttentionShape(...), query=..., ...)
    gpu.launch("moe_route_bf16", (4, 1, 1), [("p", x), ("i", 12)])                  # one kernel by itself
    y.numpy()
    gpu.loaded[x], gpu.stored[y]                 # bytes since gpu.reset_counts()
    gpu.upload(weights, count=True).loads        # how often every single byte was loaded
    gpu.launches                                 # what was launched: name, grid, and the bytes of each launch
    gpu.free(x)
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l4convert.errors import DeviceError
from l4convert.plugins.library import native
from l4convert.plugins.library.variants import OPS, SHARED_LIMIT
from tests.plugins import interpreter
from tests.plugins.interpreter import DeviceBuffer, Memory

_READ = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}
ILLEGAL_ADDRESS = 700


class _Launch(Structure):
    _fields_ = (
        ("image", c_void_p),
        ("symbol", c_char_p),
        ("grid", c_uint32 * 3),
        ("block", c_uint32 * 3),
        ("shared", c_uint32),
        ("max_dynamic_shared", c_int32),
        ("stream", c_void_p),
        ("parameters", POINTER(c_void_p)),
    )


_LAUNCH = CFUNCTYPE(c_int, POINTER(_Launch))
_COPY = CFUNCTYPE(c_int, c_uint64, c_uint64, c_size_t)
_FILL = CFUNCTYPE(c_int, c_uint64, c_int, c_size_t)


class _Device(Structure):
    _fields_ = (
        ("sm", c_int),
        ("multiprocessors", c_int),
        ("max_shared", c_int),
        ("context", c_uint64),
        ("launch", _LAUNCH),
        ("copy", _COPY),
        ("fill", _FILL),
    )


@dataclass(frozen=True)
class Launched:
    """One launch as the driver saw it."""

    kernel: native.Kernel
    grid: tuple[int, int, int]
    arguments: dict[str, float]
    loaded: Counter[DeviceBuffer]
    stored: Counter[DeviceBuffer]


def compile_driver(folder: Path) -> ctypes.CDLL:
    """Compile and load the stand-in for ``libcuda.so.1``, so that a later ``dlopen`` of that name finds it."""
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda.c")
    command = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", str(source), "-o", str(path)], check=True)
    driver = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    driver.stand_in_device.argtypes = [POINTER(_Device)]
    driver.stand_in_fail.argtypes = [c_char_p, c_int]
    return driver


class StandIn:
    """One GPU. Only the last one made is current; each has buffers and counts of its own.

    Args:
        library: The plugin library.
        driver: From :func:`compile_driver`.
        sm: Which GPU it is.
        multiprocessors: How many it has; plans depend on it.
        seed: Of the order in which a launch's blocks run.
        ops: The library's ops and their packages, for the kernels' sources.
    """

    _contexts = 0

    def __init__(
        self,
        library: native.Library,
        driver: ctypes.CDLL,
        sm: int = 90,
        multiprocessors: int = 4,
        seed: int = 0,
        ops: Mapping[str, str] = OPS,
    ) -> None:
        self.library = library
        self.driver = driver
        self.sm = sm
        self.multiprocessors = multiprocessors
        self.ops = ops
        self.seed = seed
        self.memory = Memory()
        self.launches: list[Launched] = []
        self._error: BaseException | None = None
        self._by_image = {(kernel.image, kernel.symbol): kernel for kernel in library.kernels}
        StandIn._contexts += 1
        self._context = StandIn._contexts
        self._callbacks = (_LAUNCH(self._launched), _COPY(self._copied), _FILL(self._filled))
        self.make_current()

    @property
    def loaded(self) -> Counter[DeviceBuffer]:
        """Bytes that kernels and copies read from each buffer."""
        return self.memory.loaded

    @property
    def stored(self) -> Counter[DeviceBuffer]:
        """Bytes that kernels, copies and fills wrote to each buffer."""
        return self.memory.stored

    def reset_counts(self) -> None:
        """Forget counts and launches."""
        self.memory.reset_counts()
        self.launches.clear()

    def make_current(self, context: bool = True) -> None:
        """Put this GPU in the driver, with or without a current context."""
        shared = SHARED_LIMIT.get(self.sm, max(SHARED_LIMIT.values()))
        number = self._context if context else 0
        device = _Device(self.sm, self.multiprocessors, shared, number, *self._callbacks)
        self.driver.stand_in_device(ctypes.byref(device))

    def upload(self, array: Any, name: str = "", count: bool = False) -> DeviceBuffer:
        """A buffer with an array's content (numpy, or anything that numpy takes)."""
        array = np.ascontiguousarray(array)
        buffer = DeviceBuffer(array.nbytes, name or str(array.dtype), count, array.dtype, array.shape)
        buffer.bytes[:] = array.reshape(-1).view(np.uint8)
        return self.memory.add(buffer)

    def empty(self, shape: Sequence[int], dtype: Any, name: str = "") -> DeviceBuffer:
        """A buffer that was never written: NaN, or -1."""
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self.memory.add(DeviceBuffer(nbytes, name or str(kind), False, kind, tuple(shape)))

    def free(self, *buffers: DeviceBuffer) -> None:
        """Later accesses are faults."""
        for buffer in buffers:
            assert buffer.guarded(), f"bytes around {buffer.name} were written"
            self.memory.free(buffer)

    def moe(self, moe: native.Moe, tokens: int, **buffers: DeviceBuffer) -> None:
        """One call of the op; the workspace is made, unless given, and freed."""
        size = self.library.moe_workspace(moe, tokens)
        self._with_workspace(
            size,
            buffers,
            lambda given: self.library.moe_enqueue(moe, tokens, native.MoeBuffers(**given)),
        )

    def attention(
        self, attention: native.Attention, shape: native.AttentionShape, /, **buffers: DeviceBuffer | None
    ) -> None:
        """One call of the op; the workspace is made, unless given, and freed."""
        size = self.library.attention_workspace(attention, shape, self.multiprocessors)
        self._with_workspace(
            size,
            buffers,
            lambda given: self.library.attention_enqueue(attention, shape, native.AttentionBuffers(**given)),
        )

    def launch(
        self, kernel: str, grid: tuple[int, int, int], arguments: Sequence[tuple[str, DeviceBuffer | float | None]]
    ) -> None:
        """One kernel by itself; pointers are given as buffers."""
        plain: Any = [(a, b.address if isinstance(b, DeviceBuffer) else b) for a, b in arguments]
        self.call(lambda: self.library.launch(kernel, grid, plain))

    def call(self, work: Callable[[], None]) -> None:
        """Do something with the library on this GPU; what went wrong in a kernel is raised as it was there."""
        self.make_current()
        self._error = None
        try:
            work()
        except DeviceError:
            if self._error is not None:
                raise self._error from None
            raise
        for buffer in self.memory.buffers:
            assert buffer.guarded(), f"bytes around {buffer.name} were written"

    def _with_workspace(
        self, size: int, buffers: Mapping[str, DeviceBuffer | None], work: Callable[[dict[str, int]], None]
    ) -> None:
        given = {name: buffer.address for name, buffer in buffers.items() if buffer is not None}
        if "workspace" in given:
            self.call(lambda: work(given))
            return
        workspace = self.empty((size,), np.uint8, "workspace")
        try:
            self.call(lambda: work({**given, "workspace": workspace.address}))
        finally:
            self.free(workspace)

    def _launched(self, pointer: Any) -> int:
        return self._guarded(lambda: self._run(pointer.contents))

    def _run(self, launch: _Launch) -> None:
        kernel = self._by_image[launch.image, launch.symbol.decode()]
        assert tuple(launch.block) == (32 * kernel.warps, 1, 1)
        assert launch.shared == kernel.shared
        arguments = {
            name: ctypes.cast(launch.parameters[index], POINTER(_READ[letter.lower()])).contents.value
            for index, ((name, _), letter) in enumerate(zip(kernel.parameters, kernel.types, strict=True))
        }
        count = len(arguments)
        hidden = [ctypes.cast(launch.parameters[count + i], POINTER(c_uint64)).contents.value for i in range(2)]
        assert hidden == [0, 0], "Triton's two scratch pointers"
        function = getattr(importlib.import_module(f"{self.ops[kernel.op]}.kernels"), kernel.symbol)
        before = Counter(self.memory.loaded), Counter(self.memory.stored)
        grid = (launch.grid[0], launch.grid[1], launch.grid[2])
        given = {**arguments, **kernel.constants}
        interpreter.run(function, given, dict(kernel.parameters), grid, self.memory, self.seed)
        moved = self.memory.loaded - before[0], self.memory.stored - before[1]
        self.launches.append(Launched(kernel, grid, arguments, *moved))

    def _copied(self, to: int, source: int, nbytes: int) -> int:
        def work() -> None:
            source_buffer = self.memory.find(source, nbytes, "copy")
            target_buffer = self.memory.find(to, nbytes, "copy")
            assert source + nbytes <= to or to + nbytes <= source, "the two overlap"
            ctypes.memmove(to, source, nbytes)
            self.memory.loaded[source_buffer] += nbytes
            self.memory.stored[target_buffer] += nbytes

        return self._guarded(work)

    def _filled(self, to: int, value: int, nbytes: int) -> int:
        def work() -> None:
            self.memory.stored[self.memory.find(to, nbytes, "fill")] += nbytes
            ctypes.memset(to, value, nbytes)

        return self._guarded(work)

    def _guarded(self, work: Callable[[], None]) -> int:
        try:
            work()
        except BaseException as error:  # raised again by call(), on this side of the C code
            self._error = error
            return ILLEGAL_ADDRESS
        return 0
