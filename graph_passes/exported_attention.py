"""Recognizing attention in exported graphs: masked scores, a softmax, and heads repeated for their groups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.graph_passes.evaluating import Part
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import (
    ints_of,
    is_made_by,
    is_scalar,
    made_by,
    named,
    only_user,
    operand,
    peel,
    require_perm,
    rows_of,
    scalar_of,
    split_scalar,
)

# Exporters multiply query and key with the root of the scale each, rounded to their type: twice half of its last digit.
_ROUNDED = {ir.DataType.BFLOAT16: 2.0**-8, ir.DataType.FLOAT16: 2.0**-11}
# Tokens for which shapes are computed: each is told apart from the others and from sizes of a model's own.
_PAST, _NEW = 11, 7


class Side(NamedTuple):
    """Keys or values: the new ones [B,S,Hk,D], the past [B,Hk,P,D] and the two joined, where there is a past."""

    new: ir.Value
    past: ir.Value | None
    present: ir.Value | None
    heads: int
    kv_heads: int
    width: int


class Found(NamedTuple):
    """An attention: query [B,S,H,D], keys, values, what is added to the scores (or which count), result [B,S,H*D]."""

    query: ir.Value
    key: Side
    value: Side
    mask: ir.Value
    merged: ir.Value


class _Heads(NamedTuple):
    """The same with heads in front: query [B,H,S,D], key and value [B,H,T,D], result [B,H,S,D]; no scale: 1/sqrt(D)."""

    scale: float | None
    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    result: ir.Value


def match_attention(node: ir.Node) -> Found:
    """What is around a softmax over scores, or an ``Attention`` of opset 23.

    Raises:
        Mismatch: It is not attention as exporters of transformers' models write it.
    """
    heads = _operator(node) if node.op_type == "Attention" else _plain(node)
    merged = _merged(heads.result)
    sides = _side(heads.key), _side(heads.value)
    if (sides[0].past is None) != (sides[1].past is None):
        raise Mismatch("keys have a past and values have not, or the other way round")
    if sides[0][3:] != sides[1][3:]:
        raise Mismatch("keys and values have different heads")
    rounded = _ROUNDED.get(heads.query.dtype or ir.DataType.FLOAT, 1e-5)
    if heads.scale is not None and not np.isclose(heads.scale, sides[0].width ** -0.5, rtol=rounded):
        raise Mismatch(f"scores are scaled by {heads.scale:g}, not by 1/sqrt({sides[0].width})")
    turned = made_by(heads.query, "Transpose")
    require_perm(turned, [0, 2, 1, 3])
    return Found(operand(turned), *sides, heads.mask, merged)


def _operator(attention: ir.Node) -> _Heads:
    """Operands of ``Attention``, where it does no more than the nodes that it stands for."""
    inputs = attention.inputs
    if len(inputs) < 4 or inputs[3] is None or any(x is not None for x in inputs[4:]):
        raise Mismatch("Attention has no mask, or caches of its own")
    for name in ("is_causal", "softcap", "q_num_heads", "kv_num_heads"):
        if (given := attention.attributes.get(name)) is not None and given.value:
            raise Mismatch(f"Attention has {name}={given.value}")
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        raise Mismatch("Attention gives more than its result")
    query, key, value, mask = (operand(attention, i) for i in range(4))
    scale = attention.attributes.get_float("scale", None)
    return _Heads(scale, query, key, value, mask, attention.outputs[0])


def _plain(softmax: ir.Node) -> _Heads:
    """Scores, an added mask, the softmax, the product with the values."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise Mismatch("the softmax is not over the last axis")
    scores = softmax.inputs[0]
    assert scores is not None
    product, added = _masked(made_by(peel(scores, "Cast"), "Add"))
    scale, query, key = _scores(product)
    weighted = _weighted(softmax)
    return _Heads(scale, query, _transposed_back(key), operand(weighted, 1), added, weighted.outputs[0])


def _masked(add: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The scores, and what is added to them."""
    first, second = operand(add), operand(add, 1)
    for scores, added in ((first, second), (second, first)):
        if is_made_by(peel(added, "Cast", "Identity"), "Where"):
            return scores, added
    raise Mismatch("no mask of 0 or a large negative number is added to the scores")


def _scores(value: ir.Value) -> tuple[float, ir.Value, ir.Value]:
    """Over factors, wherever they stand: their product, the query [B,H,S,D], the key [B,H,D,T]."""
    scale, value = _factors(peel(value, "Cast"))
    product = made_by(value, "MatMul")
    left, query = _factors(operand(product))
    right, key = _factors(operand(product, 1))
    return scale * left * right, query, key


def _factors(value: ir.Value) -> tuple[float, ir.Value]:
    scale = 1.0
    while is_made_by(value, "Mul") or is_made_by(value, "Div"):
        node = made_by(value, "Mul", "Div")
        if node.op_type == "Div":
            divisor = scalar_of(node.inputs[1])
            if not divisor:
                break
            scale, value = scale / divisor, operand(node)
            continue
        pair = split_scalar(node)
        if pair is None:
            break
        value, scale = pair[0], scale * pair[1]
    return scale, value


def _transposed_back(key: ir.Value) -> ir.Value:
    """The key [B,H,T,D] of [B,H,D,T], which is swapped at once or, with its leading axes put together, as [B*H,T,D]."""
    if is_made_by(key, "Transpose"):
        turned = made_by(key, "Transpose")
        require_perm(turned, [0, 1, 3, 2])
        return operand(turned)
    outer = made_by(key, "Reshape")
    turned = made_by(operand(outer), "Transpose")
    require_perm(turned, [0, 2, 1])
    inner = made_by(operand(turned), "Reshape")
    source = operand(inner)
    shape = (3, 5, 17, 19)
    if _reshaped(inner, source, shape) != [15, 17, 19] or _reshaped(outer, source, shape) != [3, 5, 19, 17]:
        raise Mismatch(f"{named(key)} is not the transposed key")
    return source


def _reshaped(node: ir.Node, source: ir.Value, shape: tuple[int, ...]) -> list[int]:
    """What a Reshape makes of a tensor of this shape, where its target depends on that tensor's shape only."""
    target = node.inputs[1]
    fixed = ints_of(target)
    if fixed is None:
        assert target is not None
        fixed = _ShapeOf(source, shape).compute(target)
    if fixed.count(-1) == 1:
        known = int(np.prod([x for x in fixed if x != -1]))
        fixed = [int(np.prod(shape)) // known if x == -1 and known else x for x in fixed]
    return fixed


class _ShapeOf:
    """Computes values that follow from the shape of one tensor."""

    def __init__(self, source: ir.Value, shape: tuple[int, ...]) -> None:
        self._known = {
            node.outputs[0]: list(shape) for node, _ in source.uses() if node.op_type == "Shape" and not _window(node)
        }

    def compute(self, value: ir.Value) -> list[int]:
        if value in self._known:
            return self._known[value]
        if (fixed := ints_of(value)) is not None:
            return fixed
        node = made_by(value, "Concat", "Slice")
        if node.op_type == "Concat":
            return [x for part in node.inputs if part is not None for x in self.compute(part)]
        bounds = [ints_of(x) for x in node.inputs[1:3]]
        if len(node.inputs) > 3 and ints_of(node.inputs[3]) != [0]:
            raise Mismatch(f"{named(value)} is not a part of a shape")
        if any(x is None or len(x) != 1 for x in bounds) or (len(node.inputs) > 4 and ints_of(node.inputs[4]) != [1]):
            raise Mismatch(f"{named(value)} is not a part of a shape")
        (start,), (stop,) = (x for x in bounds if x is not None)
        return self.compute(operand(node))[slice(*slice(start, stop).indices(4)[:2])]


def _window(shape: ir.Node) -> bool:
    return bool(shape.attributes.get_int("start", 0)) or "end" in shape.attributes


def _weighted(softmax: ir.Node) -> ir.Node:
    """The product of the weights with the values; a row of NaN may be made zeros on the way."""
    value = softmax.outputs[0]
    for _ in range(4):
        users = {node for node, _ in value.uses()}
        where = next((n for n in users if n.op_type == "Where"), None)
        if where is not None and users == {where, where.inputs[0].producer()}:  # type: ignore[union-attr]
            if not is_made_by(where.inputs[0], "IsNaN") or not is_scalar(where.inputs[1], 0.0):
                break
            value = where.outputs[0]
        elif len(users) == 1 and (node := users.pop()).op_type in ("Cast", "Identity"):
            value = node.outputs[0]
        else:
            break
    product = only_user(value, "MatMul")
    if product.inputs[0] is not value:
        raise Mismatch(f"{named(value)} does not weigh the values")
    return product


def _merged(value: ir.Value) -> ir.Value:
    """The heads side by side again: [B,S,H*D]."""
    turned = only_user(value, "Transpose")
    require_perm(turned, [0, 2, 1, 3])
    return only_user(turned.outputs[0], "Reshape").outputs[0]


def _side(repeated: ir.Value) -> Side:
    """Back over the repetition for every head of a group, and over the past."""
    if not is_made_by(repeated, "Reshape"):
        raise Mismatch(f"{named(repeated)}: keys and values are not repeated for their group's heads")
    reshape = made_by(repeated, "Reshape")
    expand = made_by(operand(reshape), "Expand")
    spread = made_by(operand(expand), "Unsqueeze")
    if ints_of(spread.inputs[1]) != [2]:
        raise Mismatch(f"{named(repeated)} does not repeat heads")
    joined = operand(spread)
    new, past, present = _new_and_past(joined)
    total = _NEW + (_PAST if past is not None else 0)
    wide, flat = _target(expand), _target(reshape)
    rows = rows_of(reshape.graph.inputs if isinstance(reshape.graph, ir.Graph) else ())
    if len(wide) != 5 or [wide[0], wide[3]] != [rows, total]:
        raise Mismatch(f"{named(expand.outputs[0])} does not repeat heads")
    kv_heads, group, width = wide[1], wide[2], wide[4]
    together = [rows, kv_heads * group, total, width]
    if len(flat) != 4 or any(size not in (-1, known) for size, known in zip(flat, together, strict=True)):
        raise Mismatch(f"{named(repeated)} does not put repeated heads together")
    turned = made_by(new, "Transpose")
    require_perm(turned, [0, 2, 1, 3])
    return Side(operand(turned), past, present, kv_heads * group, kv_heads, width)


def _new_and_past(joined: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    if not is_made_by(joined, "Concat"):
        return joined, None, None
    concat = made_by(joined, "Concat")
    past, new = (concat.inputs[0], concat.inputs[1]) if len(concat.inputs) == 2 else (None, None)
    if past is None or new is None or concat.attributes.get_int("axis", 0) not in (2, -2):
        raise Mismatch(f"{named(joined)} does not append to a past")
    if not past.is_graph_input():
        raise Mismatch(f"{named(past)} is not a cache that the graph is given")
    return new, past, joined


def _target(node: ir.Node) -> list[int]:
    """The shape that a Reshape or Expand asks for, in a call of the sizes above."""
    target = node.inputs[1]
    assert target is not None  # both operators need it
    if (fixed := ints_of(target)) is not None:
        return fixed
    part = Part(target)
    feeds = {x: np.zeros(_call_shape(x), np.int8) for x in (*part.shapes, *part.data)}
    return [int(x) for x in part.evaluator()(feeds).reshape(-1)]


def _call_shape(value: ir.Value) -> list[int]:
    rank = len(value.shape) if value.shape is not None else 0
    if value.shape is None or rank not in (2, 3, 4):
        raise Mismatch(f"the shape of {named(value)} in a call is not known")
    rows = rows_of(_graph_inputs(value))
    if rank == 4:
        return [rows, *(x if isinstance(x, int) else 1 for x in value.shape[1:2]), _PAST, *_last(value)]
    is_mask = rank == 2 and "mask" in (value.name or "")
    has_past = any(len(x.shape or ()) == 4 for x in _graph_inputs(value))
    return [rows, _NEW + (_PAST if is_mask and has_past else 0), *([1] if rank == 3 else [])]


def _graph_inputs(value: ir.Value) -> list[ir.Value]:
    return list(value.graph.inputs) if value.graph is not None else []


def _last(value: ir.Value) -> list[int]:
    assert value.shape is not None
    last = value.shape[3]
    return [last if isinstance(last, int) else 1]
