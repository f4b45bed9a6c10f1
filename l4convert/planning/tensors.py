"""The table of a plan: every stored tensor with its place, its scheme and what it is made from."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from l4convert.checkpoint.combiners import Member
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.parameters import ROUTED
from l4convert.emit.plan import PlannedTensor, WeightsPlan
from l4convert.emit.write import MODEL_FILE
from l4convert.quantization.recipe import Recipe, Scheme

# What passes append to a canonical name: graph_passes.quantize_weights, the lowerings, editing.add_initializer.
_ADDED = re.compile(r"(?P<values>_int4|_fp8)?(?:_packed)?(?P<scale>_scale)?(?:_\d+)?$")

# Kind -> pattern of canonical names, the first match wins.
_PATTERNS = (
    ("experts", ROUTED),
    ("router", re.compile(r"\.feed_forward\.router\.")),
    ("shared expert", re.compile(r"\.feed_forward\.shared_expert\.")),
    ("dense MLP", re.compile(r"\.feed_forward\.")),
    ("attention", re.compile(r"\.self_attn\.")),
    ("embedding, head", re.compile(r"^(model\.embed_tokens|lm_head)\.")),
    ("norms", re.compile(r"norm\.weight$")),
)
SCALES, CONSTANTS = "scales", "rotary tables, constants"
#: Every kind that a tensor can be of, in the order in which they are shown.
KINDS = (*(kind for kind, _ in _PATTERNS), SCALES, CONSTANTS)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the artifact.

    Attributes:
        kind: One of :data:`KINDS`.
        scheme: How the recipe stores it: ``none``, ``fp8``, or as ``int4 block 32 lse``.
        dtype: ONNX's name; packed 4-bit values are UINT8.
        shape: As the graph sees it.
        bytes: As stored.
        file, offset: Where its bytes begin; no offset where it lies inside model.onnx.
        sources: Canonical names of the checkpoint's tensors that it is computed from.
    """

    name: str
    kind: str
    scheme: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str
    offset: int | None
    sources: tuple[str, ...]


def tensor_plans(model: ir.Model, plan: WeightsPlan, recipe: Recipe) -> Iterator[TensorPlan]:
    """The tensors of the weights file in file order, those in shared files, then those that lie in model.onnx."""
    outside = [*plan.tensors, *plan.shared]
    for planned in outside:
        yield _row(planned.name, planned.tensor, recipe, planned.nbytes, planned.file, planned.offset)
    placed = {id(planned.tensor) for planned in outside}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, LazyTensor) and tensor.sources and id(tensor) not in placed:
                yield _row(name, tensor, recipe, tensor.nbytes, MODEL_FILE, None)


def classify(planned: PlannedTensor, recipe: Recipe) -> tuple[str, str]:
    """A tensor's kind and scheme, as in :class:`TensorPlan`."""
    return _classify(planned.name, planned.tensor, recipe)


def group_elements(group: Iterable[PlannedTensor]) -> int:
    """How many elements of the checkpoint the tensors of a group are computed from."""
    leaves: dict[Hashable, int] = {}
    for planned in group:
        leaves |= {id(leaf): _elements_used(planned.tensor, leaf) for leaf in _leaves(planned.tensor)}
    return sum(leaves.values())


def _elements_used(tensor: ir.TensorProtocol, leaf: LazyTensor) -> int:
    """How many elements of one of its leaves a tensor is computed from: a member of a stack uses its share."""
    while isinstance(tensor, Derived) and tensor is not leaf:
        if isinstance(tensor, Member):
            return leaf.size // max(1, tensor.parts[0].matrix[0])
        tensor = tensor.parts[0]
    return leaf.size


def _leaves(tensor: ir.TensorProtocol) -> Iterator[LazyTensor]:
    """The tensors of the checkpoint that a tensor is computed from; of packed codes, the codes."""
    if isinstance(tensor, Derived) and (len(tensor.parts) > 1 or tensor.parts[0].size >= tensor.size):
        for part in tensor.parts:
            yield from _leaves(part)
    elif isinstance(tensor, LazyTensor) and tensor.sources:
        yield tensor


def _row(
    name: str, tensor: ir.TensorProtocol, recipe: Recipe, nbytes: int, file: str, offset: int | None
) -> TensorPlan:
    kind, scheme = _classify(name, tensor, recipe)
    shape = tuple(int(extent) for extent in tensor.shape.numpy())
    return TensorPlan(name, kind, scheme, tensor.dtype.name, shape, nbytes, file, offset, _sources(tensor))


def _classify(name: str, tensor: ir.TensorProtocol, recipe: Recipe) -> tuple[str, str]:
    if not _sources(tensor):
        return CONSTANTS, "none"
    added = _ADDED.search(name)
    assert added is not None  # it matches the empty end of every name
    canonical = name[: added.start()]
    kind = kind_of_name(canonical)
    if not added["values"] and not added["scale"]:
        return kind, "none"
    return SCALES if added["scale"] else kind, label(recipe.scheme_for(canonical))


def kind_of_name(name: str) -> str:
    """The kind of the checkpoint's tensor that a tensor of this name was made of, whatever a pass appended to it."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), CONSTANTS)


def label(scheme: Scheme) -> str:
    """A scheme in a few words."""
    return f"int4 block {scheme.block_size} {scheme.scale}" if scheme.kind == "int4" else scheme.kind


def _sources(tensor: ir.TensorProtocol) -> tuple[str, ...]:
    return tensor.sources if isinstance(tensor, LazyTensor) else ()
