"""Plan model.safetensors: which initializers it holds and where each one's bytes go, before any weight is read.

Every tensor starts on a page, so that ONNX Runtime maps the file instead of copying it. safetensors allows no gaps, so
the rest of a page after a tensor is a filler tensor of its own. The order is the graph's (what runs together lies
together), except that tensors computed from the same source rows are neighbours: a *group*, which is filled in step.

On request, tensors that a file of the checkpoint holds as they are refer to that file, which becomes one of the
artifact's, and are not written (:mod:`l4convert.emit.share`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice

import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.safetensors_file import Stored
from l4convert.emit.header import Entry, align, encode_header, stored_as
from l4convert.emit.share import Choice, choose, shared_name
from l4convert.frontend.builder import INLINE

WEIGHTS_FILE = "model.safetensors"
FILLER_PREFIX = "__padding__."
# Smaller constants (shapes, scalars, small norms) stay in model.onnx, where shape inference can see them.
EXTERNAL_FROM_BYTES = 1024
# Rows of one tensor of a group to a row of another: the largest block of :mod:`l4convert.quantization.int4`.
MOST_ROWS_A_BLOCK = 128
# A tensor is written column by column only where it has this many times fewer rows than the one that it goes with has
# columns: scales have one for 32 INT4 codes, eight of which are a word.
_LEAST_TIMES_FEWER = 4


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that is stored outside the graph.

    Attributes:
        name: Its name in the manifest, and in the header of the weights file.
        values: The initializers that use it (several where the graph shares one tensor object).
        tensor: Its content.
        offset: Bytes from the start of the file; in the weights file a multiple of the page size.
        nbytes: Bytes stored.
        file: Name of the file in the artifact: the weights file, or one that is shared with the checkpoint.
    """

    name: str
    values: tuple[ir.Value, ...]
    tensor: ir.TensorProtocol
    offset: int
    nbytes: int
    file: str = WEIGHTS_FILE

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the graph sees."""
        return _shape(self.tensor)


@dataclass(frozen=True)
class WeightsPlan:
    """The whole weights file, and what is shared instead of being written to it.

    Attributes:
        header: The header's bytes.
        groups: Tensors in file order.
        shared: Tensors whose bytes stay in files of the checkpoint.
        unshared: Where sharing was asked for, the bytes that are written nevertheless, by the reason.
    """

    header: bytes
    groups: tuple[tuple[PlannedTensor, ...], ...]
    total_bytes: int
    shared: tuple[PlannedTensor, ...] = ()
    unshared: Mapping[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All tensors of the weights file in its order, fillers left out."""
        return (tensor for group in self.groups for tensor in group)

    @property
    def written_bytes(self) -> int:
        """What is really written: ``total_bytes`` less the fillers, which are holes that read as zeros."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def stored_of(planned: PlannedTensor) -> Stored:
    """The checkpoint's tensor that a shared one is."""
    assert isinstance(planned.tensor, Stored)
    return planned.tensor


def plan_weights(model: ir.Model, share: bool = False) -> WeightsPlan:
    """Place every initializer of at least ``EXTERNAL_FROM_BYTES`` bytes.

    Args:
        model: Its initializers are lazy tensors, or small ones in memory.
        share: Whether to leave tensors where they are in the checkpoint, if that is worth it (:func:`choose`).

    Raises:
        InputError: More tensors than a safetensors header can hold.
    """
    external = _external_values(model)
    choice = choose(_tensor(values[0]) for values in external) if share else Choice()
    grouped = _grouped(values for values in external if id(_tensor(values[0])) not in choice.shared)
    ordered = [values for group in grouped for values in group]
    entries = _entries([values[0] for values in ordered])
    header = encode_header(entries)
    stored = (entry for entry in entries if not entry.name.startswith(FILLER_PREFIX))
    placed = iter(
        [
            PlannedTensor(entry.name, values, _tensor(values[0]), len(header) + entry.begin, entry.end - entry.begin)
            for values, entry in zip(ordered, stored, strict=True)
        ]
    )
    groups = tuple(tuple(islice(placed, len(group))) for group in grouped)
    shared = _shared(external, choice, {entry.name for entry in entries})
    return WeightsPlan(header, groups, len(header) + (entries[-1].end if entries else 0), shared, choice.written)


def _shared(external: Sequence[tuple[ir.Value, ...]], choice: Choice, names: set[str]) -> tuple[PlannedTensor, ...]:
    """The shared tensors in graph order, under names that are not taken."""
    planned = []
    for values in external:
        if stored := choice.shared.get(id(_tensor(values[0]))):
            name = _free_name(values[0].name or "tensor", names)
            names.add(name)
            file = shared_name(stored.file)
            planned.append(PlannedTensor(name, values, stored, stored.offset, stored.nbytes, file))
    return tuple(planned)


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
    """The initializers to store outside the graph, in the order of first use; those of one tensor object together."""
    users: dict[int, list[ir.Value]] = {}
    for value in _initializers(model):
        tensor = value.const_value
        if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < EXTERNAL_FROM_BYTES:
            continue
        if value.meta.get(INLINE):
            continue
        users.setdefault(id(tensor), []).append(value)
    return [tuple(values) for values in users.values()]


def _initializers(model: ir.Model) -> Iterable[ir.Value]:
    """All of them: passes add theirs at the end of a graph's list, wherever they are used."""
    known = {value for graph in model.graphs() for value in graph.initializers.values()}
    used = (value for node in model.graph.all_nodes() for value in node.inputs if value in known)
    return dict.fromkeys(chain(used, (v for graph in model.graphs() for v in graph.initializers.values())))


def _grouped(external: Iterable[tuple[ir.Value, ...]]) -> list[list[tuple[ir.Value, ...]]]:
    """Groups in the order of their first members.

    Members have the same sources (or the same part of them) and as many matrices, of as many rows or a whole number of
    times fewer: the scales of blocks of rows. Or a member has a few long rows, and a column of it goes with a row of
    the others (:func:`goes_by_columns`): the scales of blocks inside of rows, stored the other way round.
    """
    related: dict[Hashable, list[tuple[ir.Value, ...]]] = {}
    for values in external:
        tensor = _tensor(values[0])
        together = (
            isinstance(tensor, LazyTensor)
            and bool(tensor.sources)
            and (tensor.sources, tensor.member, tensor.matrix[0])
        )
        related.setdefault(together or id(tensor), []).append(values)
    groups: list[list[tuple[ir.Value, ...]]] = []
    for members in related.values():
        highest = max(members, key=lambda values: _rows(values[0]))
        tallest = _rows(highest[0])
        parts: dict[int, list[tuple[ir.Value, ...]]] = {}
        for values in members:
            rows = _rows(values[0])
            in_step = rows > 0 and tallest % rows == 0 and tallest // rows <= MOST_ROWS_A_BLOCK
            in_step |= goes_by_columns(_tensor(values[0]), _tensor(highest[0]))
            parts.setdefault(tallest if in_step else rows, []).append(values)
        groups.extend(parts.values())
    return groups


def goes_by_columns(tensor: ir.TensorProtocol, tallest: ir.TensorProtocol) -> bool:
    """Whether a tensor of a group is written by blocks of its columns, each with as many rows of the tallest one."""
    if not isinstance(tensor, LazyTensor) or not isinstance(tallest, LazyTensor) or tensor.dtype.bitwidth < 8:
        return False
    (_, rows, cols), (_, height, width) = tensor.matrix, tallest.matrix
    few = rows * _LEAST_TIMES_FEWER <= width and rows < height
    return tensor.by_columns and not tallest.by_columns and cols == height and few


def _rows(value: ir.Value) -> int:
    tensor = _tensor(value)
    return tensor.matrix[1] if isinstance(tensor, LazyTensor) else 1


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"{value.name}: an initializer without content")
    return value.const_value


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(extent) for extent in tensor.shape.numpy())
