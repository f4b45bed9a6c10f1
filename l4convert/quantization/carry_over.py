"""What becomes of weights that a checkpoint stores quantized, when a recipe meets them.

A recipe says what the artifact stores; a checkpoint may store just that already. :func:`resolve` rewrites the recipe
for one checkpoint: rules come in front whose ``scale`` is "stored", which means the checkpoint's own codes and scales.
From there on a recipe says all there is to say, in plans, in passes and in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.combiners import OnTop, Stacked, transposed
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.names import expected_tensors
from l4convert.checkpoint.prequantized import Carried, carried, quantized_parts
from l4convert.errors import UsageError
from l4convert.quantization.int4 import BLOCK_SIZES
from l4convert.quantization.recipe import STORED, Recipe, Rule, Scheme, unused_rules

_LAYERS = "model.layers."
_EXPERTS = ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")


def resolve(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe for one checkpoint: without "keep", and with a rule for every weight that can be carried over.

    Raises:
        UsageError: A block size was asked for that is larger than the groups in which a weight is stored.
    """
    keeps = any(rule.scheme.kind == "keep" for rule in recipe.rules)
    if checkpoint.quantization is None and not keeps:
        return recipe
    plain = tuple(Rule(r.pattern, Scheme("none") if r.scheme.kind == "keep" else r.scheme) for r in recipe.rules)
    names = expected_tensors(checkpoint.config, "stacked")
    own: dict[str, Scheme] = {}
    for name in names:
        weight = fused_weight(checkpoint, name)
        scheme = None if weight is None else stored_scheme(recipe.scheme_for(name), weight, name)
        if scheme is not None:
            own[name] = scheme
    resolved = replace(recipe, rules=(*_rules(own, names), *plain))
    idle = set(unused_rules(resolved, names)) - set(unused_rules(recipe, names))  # all they were for is carried over
    return replace(resolved, rules=tuple(rule for rule in resolved.rules if rule not in idle))


def fused_weight(checkpoint: Checkpoint, name: str) -> LazyTensor | None:
    """A weight [..., N, K] by its name with experts stacked, as the passes will see it; None: not a matrix.

    Args:
        checkpoint: Experts stacked or one by one.
        name: A canonical name.
    """
    tensor = checkpoint.tensors.get(name)
    if tensor is not None:
        if len(tensor.dims) < 2:
            return None
        return transposed(tensor) if ".experts." in name else tensor
    prefix, _, projection = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    experts = [
        [checkpoint.tensors[f"{prefix}.{expert}.{part}.weight"] for part in parts]
        for expert in range(checkpoint.config.num_local_experts)
    ]
    return Stacked([OnTop(expert) if len(expert) > 1 else expert[0] for expert in experts])


def stored_scheme(wanted: Scheme, weight: LazyTensor, name: str) -> Scheme | None:
    """The scheme that takes over the codes of a weight [..., N, K]; None where they are not what is wanted.

    Raises:
        UsageError: See :func:`resolve`.
    """
    found = carried(weight)
    if found is None or wanted.kind == "none":
        return None
    depth = weight.dims[-1]
    if found.values.dtype == ir.DataType.INT4 and wanted.kind in ("int4", "keep"):
        size = _block_size(wanted, found, depth, name)
        return None if size is None else Scheme("int4", block_size=size, scale=STORED)
    if found.values.dtype == ir.DataType.FLOAT8E4M3FN and wanted.kind in ("fp8", "keep"):
        activations = found.activations if wanted.kind == "keep" else wanted.activations
        return Scheme("fp8", scale=STORED, activations=activations) if found.block_size == depth else None
    return None


def take_over(weight: LazyTensor, scheme: Scheme) -> tuple[LazyTensor, LazyTensor] | None:
    """The checkpoint's codes and scales for a scheme of :func:`stored_scheme`.

    Args:
        weight: [..., N, K].
        scheme: Its ``scale`` is "stored".

    Returns:
        Values [..., N, K] and scales [..., N, ceil(K / block_size)], for FP8 [..., N, 1]; None where there are none.
    """
    found = carried(weight)
    if found is None:
        return None
    depth = weight.dims[-1]
    size = scheme.block_size if scheme.kind == "int4" else depth
    return found.values, found.scales if size == found.block_size else RepeatedScales(found.scales, size, found, depth)


class RepeatedScales(Derived):
    """Scales of blocks as scales of smaller ones.

    Args:
        scales: [..., N, ceil(K / block size of ``found``)].
        block_size: Of the smaller blocks: it divides the larger ones, unless there is but one of those in a row.
        found: Where the scales are from.
        depth: K.
    """

    def __init__(self, scales: LazyTensor, block_size: int, found: Carried, depth: int) -> None:
        super().__init__([scales], scales.dtype, [*scales.dims[:-1], -(-depth // block_size)])
        self._small, self._large = block_size, found.block_size

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        columns = np.arange(cols.start, cols.stop) * self._small // self._large
        some = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 0)
        return self.parts[0].tile(batch, rows, some)[:, columns - some.start]


def stored_kinds(weight: LazyTensor) -> str:
    """How the checkpoint stores what a weight is made of, in words; empty: not quantized."""
    return ", ".join(dict.fromkeys(part.kind for part in quantized_parts(weight)))


def _block_size(wanted: Scheme, found: Carried, depth: int, name: str) -> int | None:
    """The block size to store: the checkpoint's groups, or smaller ones; None where groups are too small."""
    group = found.block_size
    if wanted.kind == "int4" and wanted.exact_block:
        if group < depth and (wanted.block_size > group or group % wanted.block_size):
            raise UsageError(
                f"blocks of {wanted.block_size} cannot be made of the groups of {group} in which the checkpoint stores"
                f" {name}: that would round its weights a second time",
                "leave the block size out to keep the checkpoint's groups, or give one that divides them",
            )
        return wanted.block_size
    fitting = [size for size in BLOCK_SIZES if (min(depth, group)) % size == 0]
    return max(fitting, default=BLOCK_SIZES[0] if group >= depth else None)


def _rules(own: Mapping[str, Scheme], names: Mapping[str, object]) -> Iterator[Rule]:
    """Rules for the named weights: one for all layers where they agree."""
    suffixes: dict[str, dict[str, Scheme | None]] = {}
    for name in names:
        suffixes.setdefault(_suffix(name), {})[name] = own.get(name)
    common = {suffix: next(iter(found.values())) for suffix, found in suffixes.items() if len(set(found.values())) == 1}
    together = {common.get(suffix) for suffix in _EXPERTS}
    if len(together) == 1 and (scheme := together.pop()) is not None:
        yield Rule(f"{_LAYERS}*.feed_forward.experts.*", scheme)
        suffixes = {suffix: found for suffix, found in suffixes.items() if suffix not in _EXPERTS}
    for suffix, found in suffixes.items():
        scheme = common.get(suffix)
        if scheme is not None:
            yield Rule(f"{_LAYERS}*.{suffix}" if next(iter(found)).startswith(_LAYERS) else suffix, scheme)
            continue
        yield from (Rule(name, scheme) for name, scheme in found.items() if scheme is not None)


def _suffix(name: str) -> str:
    """A name without its layer."""
    return name.removeprefix(_LAYERS).partition(".")[2] if name.startswith(_LAYERS) else name
