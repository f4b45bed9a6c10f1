"""The names that the pickle of a state dict may hold, and the values that stand for what they name.

Names are those of ``torch/_utils.py`` and ``torch/storage.py`` (torch 1.6 to 2.13) and, for what Meta's files keep
beside tensors, of Python's ``io`` and ``codecs``. None of them is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import onnx_ir as ir

MAX_RANK = 8

_T = ir.DataType
_STORAGES: Mapping[str, ir.DataType] = {
    "BFloat16Storage": _T.BFLOAT16,
    "HalfStorage": _T.FLOAT16,
    "FloatStorage": _T.FLOAT,
    "DoubleStorage": _T.DOUBLE,
    "ByteStorage": _T.UINT8,
    "CharStorage": _T.INT8,
    "ShortStorage": _T.INT16,
    "IntStorage": _T.INT32,
    "LongStorage": _T.INT64,
    "BoolStorage": _T.BOOL,
    "ComplexFloatStorage": _T.COMPLEX64,  # of RoPE's table, freqs_cis, where it was saved too
}
# Types without a storage class of their own: a tensor names them beside an untyped storage.
_DTYPES: Mapping[str, ir.DataType] = {"float8_e4m3fn": _T.FLOAT8E4M3FN, "float8_e5m2": _T.FLOAT8E5M2}

Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class PickledStorage:
    """A reference to an entry of the archive.

    Attributes:
        key: The entry's name under ``data/``.
        dtype: None: untyped.
        size: In elements; in bytes where it is untyped.
    """

    key: str
    dtype: ir.DataType | None
    size: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides in elements."""

    storage: PickledStorage
    dtype: ir.DataType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Skipped:
    """An object that is no tensor, and of which nothing was made.

    Attributes:
        kind: ``bytes``, ``_io.BytesIO``, or ``text`` (one too long for a key).
    """

    kind: str


@dataclass(frozen=True)
class Name:
    """One name of the table.

    Attributes:
        text: As the pickle writes it, "module name".
        kind: A function may be called, a class may be made anew, storages and dtypes are arguments only.
        call: What a call puts together from its arguments; it can only refuse them, or return one of the values above.
        dtype: Of a storage (None: untyped) or dtype.
    """

    text: str
    kind: Literal["function", "class", "storage", "dtype"]
    call: Callable[[tuple[Any, ...], Fail], Any] | None = None
    dtype: ir.DataType | None = None


def stored(reference: Any, fail: Fail) -> PickledStorage:
    """What a persistent id refers to: ("storage", class, key, location, number of elements)."""
    if type(reference) is not tuple or len(reference) != 5:
        fail("a persistent id that is not five values")
    word, kind, key, location, size = reference
    storage = isinstance(kind, Name) and kind.kind == "storage"
    if word != "storage" or not storage or type(key) is not str or type(location) is not str or not _natural(size):
        fail("a persistent id that is not a storage")
    return PickledStorage(key, kind.dtype, size)


def _ordered_dict(args: tuple[Any, ...], fail: Fail) -> dict[str, Any]:
    if args:
        fail("an OrderedDict that is made with arguments")
    return {}


def _tensor_v2(args: tuple[Any, ...], fail: Fail) -> PickledTensor:
    """``_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)``."""
    storage = args[0] if len(args) == 6 else None
    if not isinstance(storage, PickledStorage) or storage.dtype is None:
        fail("a tensor without a typed storage, or with metadata")
    return _tensor(storage, storage.dtype, args, fail)


def _tensor_v3(args: tuple[Any, ...], fail: Fail) -> PickledTensor:
    """``_rebuild_tensor_v3``: the same with an untyped storage, and the type as the last argument."""
    storage, kind = (args[0], args[6]) if len(args) == 7 else (None, None)
    if not isinstance(storage, PickledStorage) or storage.dtype is not None:
        fail("a tensor without an untyped storage, or with metadata")
    if not isinstance(kind, Name) or kind.kind != "dtype" or kind.dtype is None:
        fail("a tensor without a type")
    return _tensor(storage, kind.dtype, args, fail)


def _tensor(storage: PickledStorage, dtype: ir.DataType, args: tuple[Any, ...], fail: Fail) -> PickledTensor:
    _, offset, shape, strides, grad, hooks = args[:6]
    if not (_natural(offset) and _naturals(shape) and _naturals(strides) and len(shape) == len(strides)):
        fail("a tensor whose offset, size or strides are not natural numbers")
    if type(grad) is not bool or not _empty(hooks):
        fail("a tensor with hooks")
    return PickledTensor(storage, dtype, offset, shape, strides)


def _parameter(args: tuple[Any, ...], fail: Fail) -> PickledTensor:
    """``_rebuild_parameter(tensor, requires_grad, backward_hooks)``."""
    plain = len(args) == 3 and isinstance(args[0], PickledTensor) and type(args[1]) is bool and _empty(args[2])
    if not plain:
        fail("a parameter that is not a plain tensor")
    tensor: PickledTensor = args[0]
    return tensor


def _encoded(args: tuple[Any, ...], fail: Fail) -> Skipped:
    """How protocol 2 writes bytes: ``_codecs.encode(text, "latin1")``."""
    text = len(args) == 2 and (type(args[0]) is str or args[0] == Skipped("text"))
    if not text or args[1] != "latin1":
        fail("bytes that are not written as a text")
    return Skipped("bytes")


def _no_bytes(args: tuple[Any, ...], fail: Fail) -> Skipped:
    """How protocol 2 writes empty bytes: ``bytes()``."""
    if args:
        fail("bytes that are made with arguments")
    return Skipped("bytes")


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _naturals(values: Any) -> bool:
    return type(values) is tuple and len(values) <= MAX_RANK and all(map(_natural, values))


def _empty(value: Any) -> bool:
    return type(value) is dict and not value


_TABLE = (
    Name("collections OrderedDict", "function", _ordered_dict),
    Name("torch._utils _rebuild_tensor_v2", "function", _tensor_v2),
    Name("torch._utils _rebuild_tensor_v3", "function", _tensor_v3),
    Name("torch._utils _rebuild_parameter", "function", _parameter),
    Name("torch.storage UntypedStorage", "storage"),
    *(Name(f"torch {name}", "storage", dtype=dtype) for name, dtype in _STORAGES.items()),
    *(Name(f"torch {name}", "dtype", dtype=dtype) for name, dtype in _DTYPES.items()),
    # The extra state of Transformer Engine's modules, which Meta's files keep and Meta's code drops.
    Name("_io BytesIO", "class"),
    Name("_codecs encode", "function", _encoded),
    Name("__builtin__ bytes", "function", _no_bytes),
)
#: By the text of the name.
NAMES: Mapping[str, Name] = {name.text: name for name in _TABLE}
