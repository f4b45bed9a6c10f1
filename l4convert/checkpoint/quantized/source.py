"""What a reader of a quantization method is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Layout, Shape
from l4convert.checkpoint.safetensors_file import SAFETENSORS_NAMES, Stored
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

FLOAT_SCALES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT)


@dataclass(frozen=True)
class Source:
    """A quantized checkpoint's tensors while they are read.

    Attributes:
        config: The object that describes the quantization (``quantization_config`` of config.json, say).
        stored: Canonical name to the text decoder's tensors as stored. A reader takes out what it uses
            (:meth:`take`); what is left over must be one that the config has, or is reported as unexpected.
        expected: Name and shape of every weight that the model has.
        layout: How the checkpoint names what we name otherwise; patterns of modules are about its names.
    """

    config: Fields
    stored: dict[str, Stored]
    expected: Mapping[str, Shape]
    layout: Layout

    def take(self, name: str) -> Stored | None:
        """Take a tensor out; None where there is none of this name."""
        return self.stored.pop(name, None)

    def require(self, name: str, dtypes: Collection[ir.DataType], shape: Shape) -> Stored:
        """Take out a tensor that must be there, of one of these types and of this shape.

        Raises:
            InputError: It is not; names the file and the tensor.
        """
        tensor = self.take(name)
        if tensor is None:
            beside = self.beside(name)
            raise InputError(f"{beside}: tensor '{show(self.layout.stored(name))}' is missing beside it", _HINT)
        checked(tensor, dtypes, shape)
        return tensor

    def beside(self, name: str) -> str:
        """The file, or the config, to name in a message about a tensor that is absent."""
        stem = name.rpartition(".")[0]
        neighbour = next((t for other, t in self.stored.items() if other.startswith(stem + ".")), None)
        return self.config.file if neighbour is None else where(neighbour)

    def require_axes(self, weight: str, side: str) -> None:
        """See that a weight beside which something of a quantized one is stored can be quantized.

        Raises:
            InputError: It has one axis, as norms have; names the tensor ``side``.
        """
        if len(self.expected[weight]) < 2:
            what = f"'{show(self.layout.stored(weight))}' has one axis, and such weights are not quantized"
            raise InputError(f"{where(self.stored[side])}: {what}", _HINT)

    def weights(self) -> Iterator[str]:
        """Canonical names of the weights that are not stored as such, so that a reader must make them."""
        return (name for name in self.expected if name not in self.stored)


@dataclass(frozen=True)
class ReadWeights:
    """What a reader made.

    Attributes:
        tensors: Canonical name to weight, of the shape that is expected.
        words: What was quantized, for people: "compressed-tensors INT4 in groups of 128".
    """

    tensors: Mapping[str, LazyTensor]
    words: str


Reader = Callable[[Source], ReadWeights]

_HINT = "download the checkpoint again, or finish the download"


def checked(tensor: Stored, dtypes: Collection[ir.DataType], shape: Shape) -> Stored:
    """The tensor itself, if it is of one of these types and of this shape.

    Raises:
        InputError: It is not.
    """
    if tensor.dims != shape:
        raise InputError(f"{where(tensor)} has shape {list(tensor.dims)}, config.json makes it {list(shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(SAFETENSORS_NAMES[dtype] for dtype in dtypes)
        raise InputError(f"{where(tensor)} is {SAFETENSORS_NAMES[tensor.dtype]}, expected {names}")
    return tensor


def matrix(source: Source, weight: str) -> tuple[int, int]:
    """Rows and columns of a weight, for methods that store matrices only.

    Raises:
        InputError: It has another number of axes.
    """
    shape = source.expected[weight]
    if len(shape) != 2:
        what = f"tensor '{show(source.layout.stored(weight))}' has {len(shape)} axes: only matrices are stored so"
        raise InputError(f"{source.config.file}: {what}", "save the experts one by one")
    return shape[0], shape[1]


def where(tensor: Stored) -> str:
    """A stored tensor as messages name it."""
    return f"{show(tensor.file)}: tensor '{show(tensor.key)}'"


def summary(method: str, tensors: Mapping[str, LazyTensor], expected: Mapping[str, Shape]) -> str:
    """What was quantized in words: the method, the kinds with how many weights each has, and of how many."""
    from l4convert.checkpoint.prequantized import quantized_parts

    kinds: dict[str, int] = {}
    for tensor in tensors.values():
        kind = next((part.kind for part in quantized_parts(tensor)), None)
        if kind is not None:
            kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{kind} ({count:,} weights)" for kind, count in kinds.items())
    return f"{method}: {listed or 'no weights'}, of {len(expected):,} tensors"
