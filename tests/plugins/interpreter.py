"""Triton's interpreter with a memory that is watched, and with the conversions that a GPU makes.

``run(function, arguments, grid, memory)`` runs one launch of a ``@triton.jit`` function on host memory:

* every load and store is looked up in ``memory``: outside of all buffers, or not aligned to its element, it raises
  :class:`Fault` (a GPU would fault, or silently damage a neighbour); the bytes are counted per buffer;
* blocks run in an order drawn from a seed, because on a GPU they run in any;
* conversions between float32, bfloat16, float16 and float8 round to nearest even (Triton's interpreter truncates
  bfloat16 and rounds float8 ties up), computed by ml_dtypes; float8e4nv saturates, as the GPU's instruction does;
* arithmetic on bfloat16 and float8 values raises: the interpreter would compute with their bit patterns;
* products of matrices take bfloat16 and float8 operands as what they are, and sum in float32.

The function is taken as it is imported, whether ``TRITON_INTERPRET`` was set or not.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

GUARD = 256  # bytes around a buffer that belong to nobody; also the alignment that cuMemAlloc gives
EMPTY = 0xFF  # what fresh device memory holds: NaN in every float type, -1 in every integer type

STORED = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
# Stored as bit patterns, so the interpreter's arithmetic on them is wrong.
PATTERNS = frozenset(STORED)


class Fault(AssertionError):
    """A kernel or a copy touched memory that is not its own, or computed something the interpreter cannot."""


@dataclass(eq=False)
class DeviceBuffer:
    """Host memory that stands for device memory.

    Args:
        nbytes: Its size.
        name: What messages call it.
        count: Whether to count how often every single byte is loaded (:attr:`loads`).
    """

    nbytes: int
    name: str = "buffer"
    count: bool = False
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.uint8))
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._raw = np.full(self.nbytes + 3 * GUARD, EMPTY, np.uint8)
        start = -self._raw.ctypes.data % GUARD + GUARD
        self.bytes = self._raw[start : start + self.nbytes]
        self.address = self._raw.ctypes.data + start
        self._outside = (self._raw[:start], self._raw[start + self.nbytes :])
        self.shape = self.shape or (self.nbytes,)
        self.loads = np.zeros(self.nbytes if self.count else 0, np.uint16)

    @property
    def end(self) -> int:
        return self.address + self.nbytes

    def numpy(self, dtype: Any = None, shape: Sequence[int] | None = None) -> np.ndarray[Any, Any]:
        """A copy of the content, in the type and shape it was uploaded with unless others are given."""
        content = self.bytes.view(self.dtype if dtype is None else np.dtype(dtype))
        return content.reshape(self.shape if shape is None and dtype is None else shape or -1).copy()

    def guarded(self) -> bool:
        """Whether the bytes around it are as they were."""
        return all(bool(np.all(zone == EMPTY)) for zone in self._outside)


class Memory:
    """All buffers, and how many bytes of each were loaded and stored."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._buffers: list[DeviceBuffer] = []
        self.loaded: Counter[DeviceBuffer] = Counter()
        self.stored: Counter[DeviceBuffer] = Counter()

    @property
    def buffers(self) -> tuple[DeviceBuffer, ...]:
        return tuple(self._buffers)

    def add(self, buffer: DeviceBuffer) -> DeviceBuffer:
        at = bisect.bisect(self._starts, buffer.address)
        self._starts.insert(at, buffer.address)
        self._buffers.insert(at, buffer)
        return buffer

    def free(self, buffer: DeviceBuffer) -> None:
        at = self._buffers.index(buffer)
        del self._starts[at], self._buffers[at]

    def reset_counts(self) -> None:
        self.loaded.clear()
        self.stored.clear()

    def find(self, address: int, nbytes: int, what: str) -> DeviceBuffer:
        """The buffer that a range lies in.

        Raises:
            Fault: It lies in none, or not wholly.
        """
        at = bisect.bisect(self._starts, address) - 1
        if at >= 0 and address + nbytes <= self._buffers[at].end:
            return self._buffers[at]
        raise Fault(f"{what} of {nbytes} bytes at {self.describe(address)}")

    def describe(self, address: int) -> str:
        at = max(bisect.bisect(self._starts, address) - 1, 0)
        if not self._buffers:
            return f"{address:#x}, and there is no buffer"
        buffer = self._buffers[at]
        return f"byte {address - buffer.address:,} of {buffer.name}, which has {buffer.nbytes:,}"

    def touch(self, addresses: np.ndarray[Any, Any], size: int, what: str) -> Iterator[tuple[DeviceBuffer, Any]]:
        """Check accesses of ``size`` bytes each; yield every buffer with the addresses in it."""
        if addresses.size and np.any(addresses % np.uint64(size)):
            raise Fault(f"{what} of {size} bytes at an address that is not a multiple of that")
        while addresses.size:
            first = int(addresses.min())
            buffer = self.find(first, size, what)
            inside = addresses <= np.uint64(buffer.end - size)
            yield buffer, addresses[inside]
            addresses = addresses[~inside]


def run(
    function: Any,
    arguments: Mapping[str, Any],
    types: Mapping[str, str],
    grid: tuple[int, int, int],
    memory: Memory,
    seed: int = 0,
) -> None:
    """One launch.

    Args:
        function: The ``@triton.jit`` function.
        arguments: Every parameter by name: addresses, numbers, and values of constexpr ones.
        types: Triton type of those that are not constexpr.
        grid: Blocks in x, y and z.
        memory: What pointers may point into.
        seed: Of the order in which blocks run.

    Raises:
        Fault: See the module.
    """
    given = {name: _typed(value, types[name]) if name in types else value for name, value in arguments.items()}
    interpreted = InterpretedFunction(function.fn)
    order = np.random.default_rng(seed).permutation(grid[0] * grid[1] * grid[2])
    with _patched(function.fn, memory), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        body = interpreted.rewrite()
        builder = triton_interpreter.interpreter_builder
        builder.set_grid_dim(*grid)
        for number in order.tolist():
            builder.set_grid_idx(number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
            body(**given)


def _typed(value: Any, type_: str) -> tl.tensor:
    if type_.startswith("*"):
        pointer = tl.pointer_type(tl.str_to_ty(type_[1:], None))
        return tl.tensor(TensorHandle(np.array([value or 0], np.uint64), pointer), pointer)
    kind = tl.str_to_ty(type_, None)
    return tl.tensor(TensorHandle(np.array([value], triton_interpreter._get_np_dtype(kind)), kind), kind)


@contextmanager
def _patched(fn: Callable[..., Any], memory: Memory) -> Iterator[None]:
    """The interpreter's language, with this module's builder methods and calls of nested functions."""
    outer = triton_interpreter._patch_lang(tl.zeros.fn)  # the module that Triton's own library of kernels calls
    scope = triton_interpreter._patch_lang(fn)
    # NumPy 2.4 no longer makes a number of an array of one element, which Triton 3.6 relies on.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    for name, method in _methods(memory).items():
        scope.set_attr(InterpreterBuilder, name, method)
    # The language is patched already, and once is enough: the interpreter would do it anew at every call.
    scope.set_attr(InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
    # Functions of Triton's library (tl.sum) were made when it was imported, so as if to be compiled.
    scope.set_attr(JITFunction, "__call__", lambda self, *args, **kwargs: _nested(self)(*args, **kwargs))
    try:
        yield
    finally:
        scope.restore()
        outer.restore()


def _nested(function: JITFunction[Any]) -> Any:
    return InterpretedFunction(function.fn).rewrite()


def _methods(memory: Memory) -> dict[str, Callable[..., Any]]:
    original = {
        name: getattr(InterpreterBuilder, name)
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    }

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        _count_loads(memory, ptrs, mask.data)
        return original["create_masked_load"](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _count_stores(memory, ptrs, mask.data)
        return original["create_masked_store"](self, ptrs, value, mask, *rest)

    def rmw(self: Any, operation: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _count_loads(memory, ptr, mask.data)
        _count_stores(memory, ptr, mask.data)
        return original["create_atomic_rmw"](self, operation, ptr, value, mask, *rest)

    def cas(self: Any, ptr: Any, *rest: Any) -> Any:
        everything = np.ones_like(ptr.data, dtype=bool)
        _count_loads(memory, ptr, everything)
        _count_stores(memory, ptr, everything)
        return original["create_atomic_cas"](self, ptr, *rest)

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": rmw,
        "create_atomic_cas": cas,
        "cast_impl": _cast,
        "create_fp_to_fp": lambda self, src, dst_type, _rounding: _cast(self, src, dst_type),
        "create_dot": _dot,
        "binary_op": _refusing(InterpreterBuilder.binary_op),
        "create_fma": _refusing(InterpreterBuilder.create_fma),
    }


def _size(ptrs: Any) -> int:
    return max(1, int(ptrs.get_element_ty().primitive_bitwidth) // 8)


def _count_loads(memory: Memory, ptrs: Any, mask: Any) -> None:
    size = _size(ptrs)
    addresses = ptrs.data[np.broadcast_to(mask, ptrs.data.shape)]
    for buffer, inside in memory.touch(addresses, size, "load"):
        memory.loaded[buffer] += inside.size * size
        if buffer.count:
            offsets = (inside - np.uint64(buffer.address)).astype(np.int64)
            np.add.at(buffer.loads, (offsets[:, None] + np.arange(size)).ravel(), 1)


def _count_stores(memory: Memory, ptrs: Any, mask: Any) -> None:
    size = _size(ptrs)
    addresses = ptrs.data[np.broadcast_to(mask, ptrs.data.shape)]
    for buffer, inside in memory.touch(addresses, size, "store"):
        memory.stored[buffer] += inside.size * size


def _values(data: np.ndarray[Any, Any], dtype: tl.dtype) -> np.ndarray[Any, Any]:
    """What bit patterns stand for."""
    return np.ascontiguousarray(data).view(STORED[dtype]) if dtype in STORED else data


def _cast(_self: Any, src: Any, dst_type: Any) -> Any:
    target, source = dst_type.scalar, src.dtype.scalar
    values = _values(src.data, source)
    if target in STORED or source in STORED:
        values = values.astype(np.float32) if source in STORED else values
        if target == tl.float8e4nv:
            limit = np.float32(448)  # cvt.rn.satfinite
            values = np.clip(values.astype(np.float32), -limit, limit)
        if target in STORED:
            patterns = values.astype(STORED[target]).view(triton_interpreter._get_np_dtype(target))
            return TensorHandle(patterns, target)
    if target == tl.int1:
        return TensorHandle(values != 0, target)
    return TensorHandle(values.astype(triton_interpreter._get_np_dtype(dst_type)), target)


def _dot(_self: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
    left, right = (_values(operand.data, operand.dtype.scalar) for operand in (a, b))
    wide = np.int32 if left.dtype == np.int8 else np.float32
    product = np.matmul(left.astype(wide), right.astype(wide))
    return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    def checked(self: Any, *operands: Any) -> Any:
        for operand in operands:
            if isinstance(operand, TensorHandle) and operand.dtype.scalar in PATTERNS and operands[-1] not in BITWISE:
                raise Fault(f"arithmetic on {operand.dtype.scalar}: compute in float32")
        return method(self, *operands)

    return checked


assert triton.__version__.startswith("3.6."), "written against the interpreter of Triton 3.6"
