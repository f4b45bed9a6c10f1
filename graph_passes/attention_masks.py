"""What an attention mask lets through: found by computing it, and compared with the closed form of Llama 4's layers.

Query i of the new tokens stands at place P+i behind P past ones. It sees the key at place j when the attention mask has
a 1 there, j <= P+i and, in a chunked layer, floor(j'/C) == floor((P+i)'/C), where j' counts from the first real token
of the row (transformers ``masking_utils.py``, ``chunked_overlay`` with left padding) or from the row's beginning.

The chunk size is a constant that places are divided by. It is replaced by small numbers for the comparison, so that few
tokens cross many boundaries: what holds for every tried divisor, on every tried call, holds for the constant as well,
since it goes nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from l4convert.graph_passes.evaluating import Part
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import array_of, made_by, named, peel, rows_of, scalar_of

# The exponential of anything below, beside a score, is 0.
_NOTHING = -1e4
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


@dataclass(frozen=True, eq=False)
class MaskForm:
    """A mask that was understood.

    Attributes:
        chunk_size: C; 0: plain causal attention.
        from_first_token: Whether chunks are counted from a row's first real token.
        mask: The graph input that says which tokens are real; None: all are.
    """

    chunk_size: int
    from_first_token: bool
    mask: ir.Value | None


@dataclass(frozen=True)
class _Call:
    """A call to try: the mask [B,P+S], and how many tokens are new."""

    mask: np.ndarray
    new: int


def understand(added: ir.Value, has_past: bool) -> MaskForm:
    """The form of what is added to the scores.

    Args:
        added: [B or 1, 1, S, P+S]: 0 where a query sees a key, a large negative number elsewhere; or truth and untruth.
        has_past: Whether there are tokens before the new ones.

    Raises:
        Mismatch: It is not one of the two forms, or depends on something else.
    """
    part = Part(_condition(added))
    mask = _mask_input(part)
    divisors = part.divisors()
    sizes = {int(array.reshape(-1)[0]) for x in divisors if (array := array_of(x)) is not None}
    if len(sizes) > 1:
        raise Mismatch(f"places are divided by different numbers: {sorted(sizes)}")
    part.require_small_constants()
    calls = list(_calls(has_past, mask is not None, rows_of((*part.shapes, *part.data))))
    evaluate = part.evaluator()
    tried = (3, 5) if sizes else (0,)
    seen = [
        (call, size, evaluate(_feeds(part, mask, call), dict.fromkeys(divisors, size)))
        for size in tried
        for call in calls
    ]
    for from_first_token in (True, False):
        if all(_same(found, _expected(call, size, from_first_token)) for call, size, found in seen):
            return MaskForm(sizes.pop() if sizes else 0, bool(tried[0]) and from_first_token, mask)
    raise Mismatch(f"{named(added)} is neither a causal mask nor one of chunks")


def _condition(added: ir.Value) -> ir.Value:
    """The truth behind ``where(truth, 0, lowest)``, or the truth itself."""
    if added.dtype == ir.DataType.BOOL:
        return added
    node = made_by(peel(added, "Cast", "Identity"), "Where")
    zero, lowest = scalar_of(node.inputs[1]), scalar_of(node.inputs[2])
    condition = node.inputs[0]
    if zero != 0.0 or lowest is None or not lowest <= _NOTHING or condition is None:
        raise Mismatch(f"{named(added)} does not add 0 or a large negative number")
    return condition


def _mask_input(part: Part) -> ir.Value | None:
    if not part.data:
        return None
    first = part.data[0]
    if len(part.data) > 1 or first.dtype not in _INTEGERS or first.shape is None or len(first.shape) != 2:
        names = " and ".join(named(x) for x in part.data)
        raise Mismatch(f"the mask depends on {names}, where one attention mask [batch, tokens] should be")
    return first


def _calls(has_past: bool, has_mask: bool, rows: int) -> Iterator[_Call]:
    """Calls that cross chunks of 3 and of 5 in every place; with padding in front, behind and in between."""
    rng = np.random.default_rng(0)
    for past, new in ((0, 1), (0, 17), *([(4, 1), (9, 8), (15, 2)] if has_past else [])):
        ones = np.ones((rows, past + new), np.int64)
        yield _Call(ones, new)
        if not has_mask:
            continue
        for left in (1, 4, 7):
            padded = ones.copy()
            padded[-1, : min(left, past + new)] = 0
            yield _Call(padded, new)
        holes = (rng.random(ones.shape) < 0.7).astype(np.int64)
        holes[0, 0] = 1
        yield _Call(holes, new)


def _feeds(part: Part, mask: ir.Value | None, call: _Call) -> dict[ir.Value, np.ndarray]:
    batch, total = call.mask.shape
    feeds = {x: np.zeros(_shape(x, batch, total - call.new, call.new), np.int8) for x in part.shapes}
    if mask is not None and mask.dtype is not None:
        feeds[mask] = call.mask.astype(mask.dtype.numpy())
    return feeds


def _shape(value: ir.Value, batch: int, past: int, new: int) -> list[int]:
    """The shape that a graph input has in a call: caches have four axes, everything else begins with [B,S]."""
    rank = len(value.shape) if value.shape is not None else 0
    if value.shape is None or rank not in (2, 3, 4):
        raise Mismatch(f"the shape of {named(value)} is looked at, and what it is in a call is not known")
    sizes = [batch, 0, past, 0] if rank == 4 else [batch, new, 0][:rank]
    given = [size or extent for size, extent in zip(sizes, value.shape, strict=True)]
    if rank == 4:
        given[2] = past
    return [extent if isinstance(extent, int) else 1 for extent in given]


def _expected(call: _Call, size: int, from_first_token: bool) -> np.ndarray:
    batch, total = call.mask.shape
    key = np.arange(total)[None, None, :]
    query = np.arange(total - call.new, total)[None, :, None]
    visible = (call.mask[:, None, :] != 0) & (key <= query)
    if size:
        first = (np.cumsum(call.mask, axis=1) == 0).sum(axis=1)[:, None, None] if from_first_token else 0
        visible &= (key - first) // size == (query - first) // size
    shape = (batch, 1, call.new, total)
    expected: np.ndarray = np.broadcast_to(visible[:, None], shape)
    return expected


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    try:
        return bool(np.array_equal(np.broadcast_to(found != 0, expected.shape), expected))
    except ValueError:
        return False
