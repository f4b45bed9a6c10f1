"""Checking a ``TensorProto`` before anything is made of it: type, shape, and bytes that are exactly as many.

Source of the fields and of how values are packed in them: onnx/onnx.proto, message TensorProto.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError
from l4convert.onnx_in.leaves import NIBBLES, External, FileState, Inline

MAX_RANK = 16
MAX_DIM = 1 << 62
#: Tensors of fewer bytes that are no matrices stay constants of the graph: shapes, axes, scalars, small norms.
SMALL_BYTES = 1024

_DATA = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_KEYS = {"location", "offset", "length", "checksum", "basepath"}
# Where values of a type may be if not in raw_data; all others are in int32_data.
_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
_KNOWN = {
    dtype: dtype
    for dtype in ir.DataType
    if dtype not in {ir.DataType.UNDEFINED, ir.DataType.STRING} and (dtype.bitwidth >= 8 or dtype in NIBBLES)
}


class Tensors:
    """Reads tensors of one model; remembers the files beside it, and which ranges of them are taken.

    Args:
        path: The model's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: dict[str, FileState] = {}
        self._ranges: dict[str, dict[tuple[int, int], str]] = {}

    def check(self, proto: onnx.TensorProto, what: str) -> None:
        """Refuse a tensor that is not whole and well-formed, external ones included.

        Args:
            proto: The tensor.
            what: How a message names it.

        Raises:
            InputError: Names file and tensor.
        """
        if proto.data_type == onnx.TensorProto.STRING:
            self._check_strings(proto, what)
            return
        dtype, dims = self._kind(proto, what)
        if is_external(proto):
            self._range(proto, what, nbytes_of(dtype, dims))
            return
        given = [name for name in _DATA if len(getattr(proto, name))]
        count = math.prod(dims)
        if len(given) > 1 or (count and not given):
            raise self.refuse(what, f"its values are in {' and '.join(given) or 'no field'}, not in one")
        if not given:
            return
        if proto.external_data:
            raise self.refuse(what, "has values of its own and names a file, too")
        expected = nbytes_of(dtype, dims) if given[0] == "raw_data" else _values_of(dtype, count)
        if given[0] not in {"raw_data", _FIELDS.get(dtype, "int32_data")}:
            raise self.refuse(what, f"{dtype.name} values cannot be in {given[0]}")
        if (found := len(getattr(proto, given[0]))) != expected:
            unit = "bytes" if given[0] == "raw_data" else f"values in {given[0]}"
            raise self.refuse(what, f"{dtype.name} {show(list(dims))} takes {expected:,} {unit}, it has {found:,}")

    def lazy(self, proto: onnx.TensorProto, what: str) -> LazyTensor | None:
        """A checked tensor without its bytes in the model any more; None where it stays a constant of the graph."""
        if proto.data_type == onnx.TensorProto.STRING:
            return None
        dtype, dims = self._kind(proto, what)
        if is_external(proto):
            location, offset = self._range(proto, what, nbytes_of(dtype, dims))
            return External(proto.name, self.states[location], dtype, dims, offset)
        matrix_of_floats = len(dims) >= 2 and dtype.is_floating_point()
        if nbytes_of(dtype, dims) < SMALL_BYTES and not matrix_of_floats:
            return None
        if proto.raw_data:
            return Inline(proto.name, self.path, dtype, dims, proto.raw_data)
        return Inline(proto.name, self.path, dtype, dims, ir.serde.TensorProtoTensor(proto).tobytes())

    @property
    def files(self) -> tuple[Path, ...]:
        """The files beside the model that were referred to, each once."""
        return tuple(dict.fromkeys(state.path for state in self.states.values()))

    def refuse(self, what: str, reason: str, hint: str | None = None) -> InputError:
        """The error to raise."""
        return InputError(f"{show(self.path)}: {what}: {reason}", hint)

    def _kind(self, proto: onnx.TensorProto, what: str) -> tuple[ir.DataType, tuple[int, ...]]:
        dtype = _KNOWN.get(proto.data_type)  # type: ignore[call-overload]  # an integer is looked up among IntEnums
        if dtype is None:
            raise self.refuse(what, f"data type {proto.data_type} is unknown or not supported")
        if proto.HasField("segment"):
            raise self.refuse(what, "is cut into segments, which no runtime reads")
        dims = tuple(proto.dims)
        if len(dims) > MAX_RANK or any(not 0 <= extent <= MAX_DIM for extent in dims):
            raise self.refuse(what, f"shape {quote(list(dims))} is not a list of at most {MAX_RANK} sizes")
        return dtype, dims

    def _check_strings(self, proto: onnx.TensorProto, what: str) -> None:
        dims = list(proto.dims)
        if is_external(proto) or len(dims) > MAX_RANK or any(not 0 <= extent <= MAX_DIM for extent in dims):
            raise self.refuse(what, "strings must be in the model itself, under a plain shape")
        others = [name for name in _DATA if name != "string_data" and len(getattr(proto, name))]
        if others or len(proto.string_data) != math.prod(dims):
            raise self.refuse(what, f"shape {quote(dims)} does not have {len(proto.string_data):,} strings")

    def _range(self, proto: onnx.TensorProto, what: str, nbytes: int) -> tuple[str, int]:
        """Where an external tensor is: a key of ``states``, and the offset in that file."""
        entries = [(entry.key, entry.value) for entry in proto.external_data]
        fields = dict(entries)
        if len(fields) != len(entries) or not fields.keys() <= _KEYS:
            raise self.refuse(what, "its external_data has a key twice, or one that is not known")
        if any(len(getattr(proto, name)) for name in _DATA):
            raise self.refuse(what, "has values of its own and names a file, too")
        location = fields.get("location", "")
        state = self.states.get(location) or self._open(location, what)
        self.states[location] = state
        offset = self._number(fields.get("offset", "0"), "offset", what)
        length = self._number(fields["length"], "length", what) if fields.get("length") else nbytes
        if length != nbytes:
            raise self.refuse(what, f"takes {nbytes:,} bytes, its external_data gives {length:,}")
        if offset + nbytes > state.size:
            beyond = offset + nbytes - state.size
            raise self.refuse(what, f"ends {beyond:,} bytes behind the end of {show(location)}", "copy the file again")
        if nbytes:
            self._ranges.setdefault(location, {}).setdefault((offset, offset + nbytes), what)
        return location, offset

    def check_overlaps(self) -> None:
        """Refuse tensors that share part of their bytes; tied weights share all of them.

        Raises:
            InputError: Names both.
        """
        for location, ranges in self._ranges.items():
            end, last = 0, ""
            for (begin, stop), what in sorted(ranges.items()):
                if begin < end:
                    raise self.refuse(what, f"overlaps {last} in {show(location)}")
                end, last = stop, what

    def _number(self, text: str, key: str, what: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise self.refuse(what, f"external_data: {key} {quote(text)} is not a number of bytes")
        return int(text)

    def _open(self, location: str, what: str) -> FileState:
        folder = self.path.parent
        if reason := _suspicious(location):
            raise self.refuse(what, f"external_data: location {quote(location)} {reason}", _STAY)
        file = folder / location
        try:
            root, real = os.path.realpath(folder), os.path.realpath(file)
            if os.path.commonpath([root, real]) != root:
                raise self.refuse(what, f"{show(location)} is a link that leads out of the model's folder", _STAY)
            status = Path(real).stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self.refuse(what, f"{show(location)}: {show(reason)}", "copy it beside the model") from error
        if not stat.S_ISREG(status.st_mode):
            raise self.refuse(what, f"{show(location)} is not a file")
        if os.path.samestat(status, self.path.stat()):
            raise self.refuse(what, f"{show(location)} is the model itself")
        return FileState(file, status.st_size, status.st_mtime_ns)


_STAY = "weights must lie in the model's folder, or below it"


def _suspicious(location: str) -> str | None:
    if not location or "\0" in location:
        return "is not a file's name"
    if PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or location.startswith("\\"):
        return "is absolute"
    return "leads out of the model's folder" if ".." in location.replace("\\", "/").split("/") else None


def is_external(proto: onnx.TensorProto) -> bool:
    """Whether a tensor's bytes are in another file."""
    external: bool = proto.data_location == onnx.TensorProto.EXTERNAL
    return external


def nbytes_of(dtype: ir.DataType, dims: tuple[int, ...]) -> int:
    """Bytes of a tensor as ONNX stores it."""
    return -(-math.prod(dims) * int(dtype.bitwidth) // 8)


def _values_of(dtype: ir.DataType, count: int) -> int:
    """How many items a typed field has for so many elements."""
    if dtype in NIBBLES:
        return (count + 1) // 2
    return 2 * count if dtype in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128} else count


def attribute_tensors(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """The tensors in a node's attributes, with the attribute's name."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.name, attribute.t
        for tensor in attribute.tensors:
            yield attribute.name, tensor
