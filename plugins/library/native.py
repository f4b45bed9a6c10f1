"""``libl4convert_plugins.so`` from Python: what is in it, and one call of each op, through ctypes (api.h).

Buffers are plain addresses of device memory in the CUDA context that is current; nothing here allocates or waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, Union, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as address
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from l4convert.errors import DeviceError
from l4convert.plugins.library.opening import not_a_library, open_library
from l4convert.plugins.library.structures import (
    FLOATS,
    KV_DTYPES,
    WEIGHTS,
    Attention,
    AttentionBuffers,
    AttentionShape,
    Moe,
    MoeBuffers,
)
from l4convert.plugins.library.variants import Constant

# Where `l4convert plugins build` puts it.
DEFAULT_LIBRARY = Path("build/plugins/libl4convert_plugins.so")

__all__ = [
    "FLOATS",
    "KV_DTYPES",
    "WEIGHTS",
    "Attention",
    "AttentionBuffers",
    "AttentionShape",
    "Kernel",
    "Library",
    "Moe",
    "MoeBuffers",
    "load",
]


class _Value(Union):
    _fields_ = (("pointer", address), ("int32", c_int32), ("int64", c_int64), ("float32", c_float))


class _Argument(Structure):
    _fields_ = (("type", c_int32), ("value", _Value))


class _KernelInfo(Structure):
    _fields_ = (
        ("name", c_char_p),
        ("op", c_char_p),
        ("sm", c_int32),
        ("exact", c_int32),
        ("image", address),
        ("size", c_uint64),
        ("symbol", c_char_p),
        ("warps", c_int32),
        ("shared", c_int32),
        ("types", c_char_p),
        ("parameters", c_char_p),
        ("constants", c_char_p),
        ("registers", c_int32),
        ("spills", c_int32),
        ("blocks", c_int32),
    )


@dataclass(frozen=True)
class Kernel:
    """One kernel of a library for one SM.

    Args:
        name: The variant.
        op: The op it belongs to.
        sm: What it was compiled for: 90 is 9.0.
        exact: Whether it runs on that SM only; others run on later ones of the same major number too.
        image: Address of its cubin in this process.
        size: Bytes of the cubin.
        symbol: Its name in the cubin, which is that of the ``@triton.jit`` function.
        warps: Warps of a block.
        shared: Bytes of shared memory of a block.
        types: A letter a parameter, as the driver checks them.
        parameters: Name and Triton type of every parameter, in order.
        constants: The constexpr parameters.
        registers: Of a thread.
        spills: Bytes of local memory of a thread.
        blocks: Blocks that fit a multiprocessor at once.
    """

    name: str
    op: str
    sm: int
    exact: bool
    image: int
    size: int
    symbol: str
    warps: int
    shared: int
    types: str
    parameters: tuple[tuple[str, str], ...]
    constants: dict[str, Constant]
    registers: int
    spills: int
    blocks: int


class Library:
    """A loaded library. Calls raise :class:`DeviceError` with the library's own words.

    Args:
        path: The file.

    Raises:
        InputError: There is no such file, or it is no library of this kind and version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = open_library(path)
        try:
            _declare(self._library)
        except AttributeError as error:
            raise not_a_library(path, str(error)) from None

    @property
    def version(self) -> str:
        """Of the l4convert that built it."""
        return str(self._library.l4_version().decode())

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """Everything in it, by op, name and SM."""
        count = self._library.l4_kernel_count()
        return tuple(_kernel(self._library.l4_kernel(index).contents) for index in range(count))

    @property
    def sms(self) -> tuple[int, ...]:
        """What it was built for."""
        return tuple(sorted({kernel.sm for kernel in self.kernels}))

    def moe_check(self, moe: Moe) -> None:
        """Whether there is a kernel for these sizes and types."""
        self._call("l4_moe_check", byref(moe))

    def moe_workspace(self, moe: Moe, tokens: int) -> int:
        """Bytes of scratch memory of a call."""
        size = c_size_t()
        self._call("l4_moe_workspace", byref(moe), tokens, byref(size))
        return size.value

    def moe_enqueue(self, moe: Moe, tokens: int, buffers: MoeBuffers, stream: int = 0) -> None:
        """Put one call on a stream of the current context."""
        self._call("l4_moe_enqueue", byref(moe), tokens, byref(buffers), stream)

    def attention_check(self, attention: Attention) -> None:
        """Whether there is a kernel for these sizes and types."""
        self._call("l4_attention_check", byref(attention))

    def attention_workspace(self, attention: Attention, shape: AttentionShape, multiprocessors: int) -> int:
        """Bytes of scratch memory of a call."""
        size = c_size_t()
        self._call("l4_attention_workspace", byref(attention), byref(shape), multiprocessors, byref(size))
        return size.value

    def attention_enqueue(
        self, attention: Attention, shape: AttentionShape, buffers: AttentionBuffers, stream: int = 0
    ) -> None:
        """Put one call on a stream of the current context."""
        self._call("l4_attention_enqueue", byref(attention), byref(shape), byref(buffers), stream)

    def preload(self, op: str) -> None:
        """Load an op's kernels into the current context."""
        self._call("l4_preload", op.encode())

    def launch(
        self, kernel: str, grid: tuple[int, int, int], arguments: Sequence[tuple[str, float]], stream: int = 0
    ) -> None:
        """Launch one kernel by itself.

        Args:
            kernel: The variant's name.
            grid: Blocks in x, y and z.
            arguments: A letter (p, i, l, f: pointer, int32, int64, float32) and a value for every parameter.
            stream: Address of the stream; 0 is the default one.
        """
        converted = (_Argument * len(arguments))(*(_argument(letter, value) for letter, value in arguments))
        self._call("l4_launch", kernel.encode(), *grid, converted, len(arguments), stream)

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._library, name)(*arguments):
            raise DeviceError(str(self._library.l4_last_error().decode()))


def load(path: Path) -> Library:
    """Load a library.

    Raises:
        InputError: See :class:`Library`.
    """
    return Library(path)


_NAMES = {"p": "pointer", "i": "int32", "l": "int64", "f": "float32"}


def _argument(letter: str, value: float) -> _Argument:
    union = _Value()
    setattr(union, _NAMES[letter], value)
    return _Argument(ord(letter), union)


def _declare(library: ctypes.CDLL) -> None:
    """Argument and result types of every function; a missing one shows here and not in a call."""
    status = c_int32
    moe, attention, shape = POINTER(Moe), POINTER(Attention), POINTER(AttentionShape)
    size = POINTER(c_size_t)
    functions: dict[str, tuple[object, list[object]]] = {
        "l4_version": (c_char_p, []),
        "l4_last_error": (c_char_p, []),
        "l4_kernel_count": (c_int32, []),
        "l4_kernel": (POINTER(_KernelInfo), [c_int32]),
        "l4_moe_check": (status, [moe]),
        "l4_moe_workspace": (status, [moe, c_int64, size]),
        "l4_moe_enqueue": (status, [moe, c_int64, POINTER(MoeBuffers), address]),
        "l4_attention_check": (status, [attention]),
        "l4_attention_workspace": (status, [attention, shape, c_int32, size]),
        "l4_attention_enqueue": (status, [attention, shape, POINTER(AttentionBuffers), address]),
        "l4_preload": (status, [c_char_p]),
        "l4_launch": (status, [c_char_p, c_uint32, c_uint32, c_uint32, POINTER(_Argument), c_int32, address]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def _kernel(info: _KernelInfo) -> Kernel:
    parameters = [item.split(":", 1) for item in info.parameters.decode().split(",") if item]
    return Kernel(
        name=info.name.decode(),
        op=info.op.decode(),
        sm=info.sm,
        exact=bool(info.exact),
        image=info.image,
        size=info.size,
        symbol=info.symbol.decode(),
        warps=info.warps,
        shared=info.shared,
        types=info.types.decode(),
        parameters=tuple((name, type_) for name, type_ in parameters),
        constants=_constants(info.constants.decode()),
        registers=info.registers,
        spills=info.spills,
        blocks=info.blocks,
    )


def _constants(text: str) -> dict[str, Constant]:
    items = (item.split("=", 1) for item in text.split(",") if item)
    return {name: _constant(value) for name, value in items}


def _constant(text: str) -> Constant:
    if text.startswith("'"):
        return text.strip("'")
    try:
        return int(text)
    except ValueError:
        return float(text)
