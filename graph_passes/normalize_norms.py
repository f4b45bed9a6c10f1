"""Normalize norms: a root mean square taken apart, with or without weights, becomes ``RMSNormalization``.

What it is looked for: x times, or divided by, the root of the mean of x squared plus epsilon, over the last axis; in
float32 between casts where the model is narrower, which is what the operator does itself (its ``stash_type``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import clean_up, replace_outputs
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import (
    ints_of,
    is_made_by,
    is_scalar,
    made_by,
    named,
    scalar_of,
    split_operands,
)
from l4convert.quantization.recipe import Recipe

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


class _Norm(NamedTuple):
    """What was found: the input, the result, the weights (None: all one) and epsilon."""

    x: ir.Value
    output: ir.Value
    scale: ir.Value | None
    epsilon: float
    width: int


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Try every root of a mean of squares."""
    outcome = Outcome()
    for root in [n for n in model.graph if n.op_type == "Sqrt" and n.domain in ("", "ai.onnx")]:
        if not _is_mean_of_squares(root):
            continue
        try:
            norm = _match(root)
        except Mismatch as reason:
            outcome.skip(root.name, str(reason))
            continue
        _replace(model.graph, root, norm)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _is_mean_of_squares(root: ir.Node) -> bool:
    add = root.inputs[0].producer() if root.inputs[0] is not None else None
    return add is not None and add.op_type == "Add" and any(is_made_by(x, "ReduceMean") for x in add.inputs)


def _match(root: ir.Node) -> _Norm:
    mean, epsilon_value = split_operands(made_by(root.inputs[0], "Add"), "ReduceMean")
    epsilon = scalar_of(epsilon_value)
    if epsilon is None:
        raise Mismatch(f"{named(epsilon_value)} is not a constant epsilon")
    x = _squared(_mean_over_last(made_by(mean, "ReduceMean")))
    product = _product(root.outputs[0], x)
    source, output = _without_casts(x, product)
    scaled = _scaled(output)
    scale, result = scaled if scaled is not None else (None, output)
    width = _width(x, scale)
    return _Norm(source, result, scale, epsilon, width)


def _mean_over_last(node: ir.Node) -> ir.Value:
    if not node.attributes.get_int("keepdims", 1):
        raise Mismatch("the mean drops its axis")
    value = node.inputs[0]
    assert value is not None  # ReduceMean's first input is not optional
    axes = ints_of(node.inputs[1]) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", []))
    rank = len(value.shape) if value.shape is not None else None
    if axes is None or len(axes) != 1 or (axes[0] != -1 and (rank is None or axes[0] != rank - 1)):
        raise Mismatch(f"the mean is over axes {axes}, not over the last one")
    return value


def _squared(value: ir.Value) -> ir.Value:
    node = made_by(value, "Pow", "Mul")
    base, other = node.inputs[0], node.inputs[1]
    if base is None or not (other is base if node.op_type == "Mul" else is_scalar(other, 2.0)):
        raise Mismatch(f"{named(value)} is not a square")
    return base


def _product(root: ir.Value, x: ir.Value) -> ir.Value:
    """``x / root``, or ``x * (1 / root)``."""
    for node, index in root.uses():
        if node.op_type == "Div" and index == 1 and node.inputs[0] is x:
            return node.outputs[0]
        inverse = node.op_type == "Reciprocal" or (
            node.op_type == "Div" and index == 1 and is_scalar(node.inputs[0], 1.0)
        )
        if inverse:
            for user, _ in node.outputs[0].uses():
                if user.op_type == "Mul" and x in user.inputs:
                    return user.outputs[0]
    raise Mismatch(f"{named(x)} is not divided by its root mean square")


def _without_casts(x: ir.Value, product: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Input and result in the narrow type, where both are cast to float32 and back."""
    cast = x.producer()
    users = [node for node, _ in product.uses()]
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None or cast.inputs[0].dtype not in _NARROW:
        return x, product
    wanted = int(cast.inputs[0].dtype)
    if len(users) == 1 and users[0].op_type == "Cast" and users[0].attributes["to"].as_int() == wanted:
        return cast.inputs[0], users[0].outputs[0]
    return x, product


def _scaled(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The stored weights that a value is multiplied with, and the product; None where it is not."""
    users = [node for node, _ in value.uses()]
    if len(users) != 1 or users[0].op_type != "Mul" or value.is_graph_output():
        return None
    scale = next((x for x in users[0].inputs if x is not value), None)
    stored = scale.const_value if scale is not None and not scale.is_graph_input() else None
    if scale is None or stored is None or scale.producer() is not None or len(stored.shape) != 1:
        return None
    return scale, users[0].outputs[0]


def _width(x: ir.Value, scale: ir.Value | None) -> int:
    last = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if not isinstance(last, int):
        raise Mismatch(f"the width of {named(x)} is not known")
    if scale is not None and scale.shape is not None and list(scale.shape) != [last]:
        raise Mismatch(f"{named(scale)} does not have the {last} elements of the last axis")
    return last


def _replace(graph: ir.Graph, root: ir.Node, norm: _Norm) -> None:
    b = Builder((root.name or "norm").rpartition("/")[0] + "/" + (norm.output.name or "norm"))
    dtype = norm.x.dtype or ir.DataType.FLOAT
    scale = norm.scale
    if scale is None:
        scale = b.constant(np.ones(norm.width), dtype.numpy())
    result = b.op("RMSNormalization", norm.x, scale, axis=-1, epsilon=norm.epsilon, name="rms_norm")
    after = norm.output.producer()
    assert after is not None  # a product or a Cast
    graph.insert_before(after, b.nodes)
    replace_outputs([norm.output], [result])
