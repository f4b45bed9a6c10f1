"""Plan model.safetensors: which initializers it holds and where each one's bytes go, before any weight is read.

Every tensor starts on a page, so that ONNX Runtime maps the file instead of copying it. safetensors allows no gaps, so
the rest of a page after a tensor is a filler tensor of its own. The order is the graph's (what runs together lies
together), except that tensors computed from the same source rows are neighbours: a *group*, which is filled in step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice

import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.emit.header import Entry, align, encode_header, stored_as

WEIGHTS_FILE = "model.safetensors"
FILLER_PREFIX = "__padding__."
# Smaller constants (shapes, scalars, small norms) stay in model.onnx, where shape inference can see them.
EXTERNAL_FROM_BYTES = 1024


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the weights file.

    Attributes:
        name: Its name in the safetensors header and the manifest.
        values: The initializers that use it (several where the graph shares one tensor object).
        tensor: Its content.
        offset: Bytes from the start of the file; a multiple of the page size.
        nbytes: Bytes stored.
    """

    name: str
    values: tuple[ir.Value, ...]
    tensor: ir.TensorProtocol
    offset: int
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the graph sees."""
        return _shape(self.tensor)


@dataclass(frozen=True)
class WeightsPlan:
    """The whole weights file: its header's bytes, and groups of tensors in file order."""

    header: bytes
    groups: tuple[tuple[PlannedTensor, ...], ...]
    total_bytes: int

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All tensors in file order, fillers left out."""
        return (tensor for group in self.groups for tensor in group)

    @property
    def written_bytes(self) -> int:
        """What is really written: ``total_bytes`` less the fillers, which are holes that read as zeros."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_weights(model: ir.Model) -> WeightsPlan:
    """Place every initializer of at least ``EXTERNAL_FROM_BYTES`` bytes.

    Raises:
        InputError: More tensors than a safetensors header can hold.
    """
    grouped: dict[Hashable, list[tuple[ir.Value, ...]]] = {}
    for values in _external_values(model):
        grouped.setdefault(_group_key(values[0]), []).append(values)
    ordered = [values for group in grouped.values() for values in group]
    entries = _entries([values[0] for values in ordered])
    header = encode_header(entries)
    stored = (entry for entry in entries if not entry.name.startswith(FILLER_PREFIX))
    placed = iter(
        [
            PlannedTensor(entry.name, values, _tensor(values[0]), len(header) + entry.begin, entry.end - entry.begin)
            for values, entry in zip(ordered, stored, strict=True)
        ]
    )
    groups = tuple(tuple(islice(placed, len(group))) for group in grouped.values())
    return WeightsPlan(header, groups, len(header) + (entries[-1].end if entries else 0))


def _entries(values: Sequence[ir.Value]) -> list[Entry]:
    """Header entries of the values' tensors in this order, with a filler wherever a page is not full."""
    entries: list[Entry] = []
    names: set[str] = set()
    position = fillers = 0
    for value in values:
        tensor = _tensor(value)
        start = align(position)
        if start > position:
            entries.append(Entry(f"{FILLER_PREFIX}{fillers}", "U8", (start - position,), position, start))
            fillers += 1
        name = _free_name(value.name or "tensor", names)
        names.add(name)
        position = start + tensor.nbytes
        entries.append(Entry(name, *stored_as(tensor.dtype, _shape(tensor), tensor.nbytes), start, position))
    return entries


def _free_name(name: str, taken: set[str]) -> str:
    """``name``, numbered where a sibling subgraph has the same one or the file format reserves it."""
    base = name.lstrip("_") if name.startswith((FILLER_PREFIX, "__metadata__")) else name
    candidates = chain([base], (f"{base}.{number}" for number in count(2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _external_values(model: ir.Model) -> list[tuple[ir.Value, ...]]:
    """The initializers to store outside the graph, in graph order; those of one tensor object together."""
    users: dict[int, list[ir.Value]] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_FROM_BYTES:
                continue
            users.setdefault(id(tensor), []).append(value)
    return [tuple(values) for values in users.values()]


def _group_key(value: ir.Value) -> Hashable:
    tensor = value.const_value
    if isinstance(tensor, LazyTensor) and tensor.sources:
        return (tensor.sources, tensor.matrix[:2])
    return id(value)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"{value.name}: an initializer without content")
    return value.const_value


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(extent) for extent in tensor.shape.numpy())
