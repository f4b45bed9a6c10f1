"""Which of a checkpoint's tensors the pairs of an adapter change, and by what factors.

peft adapts a linear layer W [out, in] by B @ A, an embedding table [vocabulary, hidden] by (B @ A)^T, and a stack of
experts P [E, n, m] (``target_parameters``) by one product an expert: expert e has rows e r to (e + 1) r of lora_A and
columns e, e + E, e + 2 E ... of lora_B (peft 0.21.2, tuners/lora/layer.py, ``ParamWrapper.get_delta_weight``). Since
peft 0.19 lora_A is [E r, m] and lora_B [n, r E]; before, lora_A was [E r, n] and lora_B [m, r E].

Experts may be stacked in the checkpoint and one by one in the adapter, or the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from l4convert.checkpoint.adapters.config import AdapterConfig
from l4convert.checkpoint.adapters.contents import Adapter, Place
from l4convert.checkpoint.adapters.merged import Columns, EveryNth, Split, Update
from l4convert.checkpoint.adapters.patterns import Patterns
from l4convert.checkpoint.combiners import Member, transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Layout, Shape
from l4convert.checkpoint.safetensors_file import Stored
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_EXPERTS = ".feed_forward.experts"
_PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which Llama4TextExperts has them, and peft wraps them
_EXPERT = re.compile(r"(.*\.feed_forward\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_SWAPPED_SINCE = (0, 19)


@dataclass(frozen=True)
class Base:
    """The model that an adapter is merged into.

    Attributes:
        shapes: Of its tensors, by canonical name.
        stacked: Of the same model with experts stacked.
        layout: How the adapter names modules.
        unfused: Whether its experts are one by one.
    """

    shapes: Mapping[str, Shape]
    stacked: Mapping[str, Shape]
    layout: Layout
    unfused: bool


class Scales:
    """Rank and scale of whatever an adapter changes.

    Args:
        config: The adapter's.

    Raises:
        InputError: A pattern is not usable.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self._config = config
        self._ranks = Patterns(config.rank_pattern, f"{config.file}: rank_pattern")
        self._alphas = Patterns(config.alpha_pattern, f"{config.file}: alpha_pattern")

    def find(self, name: str) -> tuple[int, float]:
        """Of a module, or a parameter that ``target_parameters`` lists, by the name it had in training."""
        rank = self._ranks.find(name, self._config.rank)
        return rank, self._config.scale(rank, self._alphas.find(name, self._config.alpha))

    def name_of(self, place: Place) -> str:
        """The name of what a pair changes: a parameter where it is listed as one, else the module."""
        if place.module.endswith(_EXPERTS):
            adapted = [one for one in _PARAMETERS if self.lists(f"{place.module}.{one}")]
            # The one that was wrapped last is the outermost.
            outer = len(adapted) - 1 - place.depth
            return f"{place.module}.{adapted[outer]}" if outer >= 0 else place.module
        weight = f"{place.module}.weight"
        return weight if self.lists(weight) else place.module

    def lists(self, name: str) -> bool:
        """Whether ``target_parameters`` has a tensor, whole or by its end (peft's ``_inject_parameters``)."""
        return any(name == one or name.endswith(f".{one}") for one in self._config.parameters)


class Targets:
    """Finds what each pair of an adapter changes.

    Args:
        adapter: The adapter.
        base: The model.
    """

    def __init__(self, adapter: Adapter, base: Base) -> None:
        self.adapter, self.base = adapter, base
        self.config: AdapterConfig = adapter.config
        self._scales = Scales(adapter.config)

    def updates(self, place: Place) -> Iterator[tuple[str, Update]]:
        """Canonical names of the tensors that a pair changes, each with its update.

        Raises:
            InputError: The model has no such module, or the factors do not fit it or the config's rank.
        """
        a, b = self.adapter.pairs[place]
        name = self.base.layout.canonical(f"{place.module}.weight")
        if name is not None and name.removesuffix(".weight").endswith(_EXPERTS):
            yield from self._experts(place, name.removesuffix(".weight"), a, b)
        elif name is not None and place.depth == 0 and (shape := self._linear_shape(name)) is not None:
            yield from self._linear(place, name, shape, a, b)
        else:
            raise InputError(
                f"{_where(a)} is for a module '{show(place.module)}' that this model does not adapt", self._other_base()
            )

    def _linear_shape(self, name: str) -> Shape | None:
        """The shape of a matrix, also of an expert's that the checkpoint has in a stack."""
        shape = self.base.shapes.get(name)
        if shape is not None:
            return shape if len(shape) == 2 else None
        match = _EXPERT.fullmatch(name)
        stack = self.base.stacked.get(f"{match[1]}.down_proj") if match else None
        if match is None or stack is None or int(match[2]) >= stack[0]:
            return None
        _, width, hidden = stack
        return (hidden, width) if match[3] == "down" else (width, hidden)

    def _linear(self, place: Place, name: str, shape: Shape, a: Stored, b: Stored) -> Iterator[tuple[str, Update]]:
        rank, scale = self._scales.find(self._scales.name_of(place))
        if place.embedding and name != EMBEDDINGS:
            raise InputError(f"{_where(a)} is of an embedding, which '{show(place.module)}' is not", self._other_base())
        rows, cols = (shape[1], shape[0]) if place.embedding else shape
        self._require_shapes(a, b, (rank, cols), (rows, rank), name, shape)
        left, right = (transposed(a), transposed(b)) if place.embedding else (b, a)
        if name in self.base.shapes:
            yield name, Update(left, right, scale)
        else:
            yield _into_stack(name, shape, Update(left, right, scale))

    def _experts(self, place: Place, experts: str, a: Stored, b: Stored) -> Iterator[tuple[str, Update]]:
        trained = self._scales.name_of(place)
        parameter = trained.rpartition(".")[2]
        name = f"{experts}.{parameter}"
        stack = self.base.stacked.get(name)
        if stack is None or place.embedding:
            why = "target_parameters does not list so many parameters of it" if stack is None else "it is no embedding"
            raise InputError(f"{_where(a)} is for '{show(place.module)}': {why}", f"see {self.config.file}")
        rank, scale = self._scales.find(trained)
        left, right = self._stacks(a, b, rank, name, stack)
        if not self.base.unfused:
            yield name, Update(left, right, scale)
            return
        for expert in range(stack[0]):
            yield from _out_of_stack(experts, expert, parameter, Member(left, expert), Member(right, expert), scale)

    def _stacks(self, a: Stored, b: Stored, rank: int, name: str, stack: Shape) -> tuple[LazyTensor, LazyTensor]:
        """Factors [E, n, r] and [E, r, m] of a stack of experts [E, n, m]."""
        count, rows, cols = stack
        new, old = ((count * rank, cols), (rows, rank * count)), ((count * rank, rows), (cols, rank * count))
        before = () < self.config.peft < _SWAPPED_SINCE or rows != cols
        if before and (a.dims, b.dims) == old:
            return transposed(Split(a, count)), transposed(EveryNth(b, count))
        self._require_shapes(a, b, *new, name, stack)
        return EveryNth(b, count), Split(a, count)

    def _require_shapes(self, a: Stored, b: Stored, a_shape: Shape, b_shape: Shape, name: str, shape: Shape) -> None:
        for tensor, wanted in ((a, a_shape), (b, b_shape)):
            if tensor.dims != wanted:
                message = f"{_where(tensor)} has shape {list(tensor.dims)}, {list(wanted)} fits '{name}' {list(shape)}"
                raise InputError(f"{message} and the rank in {self.config.file}", self._other_base())

    def _other_base(self) -> str:
        base = self.config.base
        trained = f"the adapter was trained on {show(base)!r}" if base else "the adapter may be another model's"
        return f"{trained}; its ranks and targets are in {self.config.file}"


def _into_stack(name: str, shape: Shape, update: Update) -> tuple[str, Update]:
    """The update of one expert's matrix, as one of the stack that holds its transpose."""
    match = _EXPERT.fullmatch(name)
    assert match is not None  # only experts have a shape and are not in the checkpoint by themselves
    parameter = "down_proj" if match[3] == "down" else "gate_up_proj"
    first = shape[0] if match[3] == "up" else 0
    factors = transposed(update.right), transposed(update.left)
    return f"{match[1]}.{parameter}", Update(*factors, update.scale, int(match[2]), first)


def _out_of_stack(
    experts: str, expert: int, parameter: str, left: LazyTensor, right: LazyTensor, scale: float
) -> Iterator[tuple[str, Update]]:
    """The update of one matrix of a stack, as updates of the weights [out, in] that it is the transposes of."""
    if parameter == "down_proj":
        yield f"{experts}.{expert}.down_proj.weight", Update(transposed(right), transposed(left), scale)
        return
    half = right.dims[1] // 2
    for index, kind in enumerate(("gate", "up")):
        columns = Columns(right, slice(index * half, (index + 1) * half))
        yield f"{experts}.{expert}.{kind}_proj.weight", Update(transposed(columns), transposed(left), scale)


def _where(tensor: Stored) -> str:
    return f"{show(tensor.file)}: tensor '{show(tensor.key)}'"
