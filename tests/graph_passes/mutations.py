"""Single changes to a graph, for tests of what a pass must leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def node(model: ir.Model, name: str) -> ir.Node:
    """The node of this name."""
    (found,) = [n for n in model.graph if n.name == name]
    return found


def set_attributes(model: ir.Model, name: str, **attributes: Any) -> None:
    for attribute in ir.convenience.convert_attributes(attributes):
        node(model, name).attributes.add(attribute)


def insert_after(model: ir.Model, name: str, op_type: str, *inputs: ir.Value, output: int = 0) -> ir.Node:
    """Put a node that gives the same shape between an output of ``name`` and all users of that output."""
    before = node(model, name)
    value = before.outputs[output]
    users = list(value.uses())
    extra = ir.Node("", op_type, [value, *inputs], num_outputs=1, name=f"{name}/extra")
    extra.outputs[0].name = f"{name}/extra"
    model.graph.insert_after(before, extra)
    for user, index in users:
        user.replace_input_with(index, extra.outputs[0])
    return extra


def constant(model: ir.Model, value: Any, dtype: Any = np.float32) -> ir.Value:
    """A ``Constant`` at the front of the graph, named ``mutation/constant`` (then ``mutation/constant_1``, ...)."""
    number = sum((n.name or "").startswith("mutation/constant") for n in model.graph)
    name = f"mutation/constant_{number}" if number else "mutation/constant"
    made = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(np.asarray(value, dtype)))], name=name)
    made.outputs[0].name = name
    model.graph.insert_before(model.graph[0], made)
    return made.outputs[0]


def replace_input(model: ir.Model, name: str, index: int, value: ir.Value | None) -> None:
    node(model, name).replace_input_with(index, value)
