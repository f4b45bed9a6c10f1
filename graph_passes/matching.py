"""Matching a subgraph against a definition: the pattern is the function body that will replace it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class Mismatch(Exception):
    """Why a subgraph is not the definition; the message goes into the pass's report."""


class Match:
    """Unifies values of a pattern with values of a graph, from outputs to inputs.

    Args:
        inputs: The pattern's inputs; each binds to exactly one graph value.
    """

    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        self._inputs = set(inputs)
        self._bound: dict[ir.Value, ir.Value] = {}

    def __getitem__(self, pattern: ir.Value) -> ir.Value:
        """The graph value that a pattern value is bound to."""
        return self._bound[pattern]

    def unify(self, pattern: ir.Value, value: ir.Value) -> None:
        """Bind ``pattern`` and everything upstream of it to ``value`` and what is upstream of that.

        Raises:
            Mismatch: Some node differs; nothing is bound then.
        """
        trial = dict(self._bound)
        stack = [(pattern, value)]
        while stack:
            left, right = stack.pop()
            if left in trial:
                if trial[left] is not right:
                    raise Mismatch(f"{_name(right)} stands where {_name(trial[left])} should")
                continue
            trial[left] = right
            if left in self._inputs:
                continue
            stack += _same_node(left, right)
        self._bound = trial

    def find(self, pattern: ir.Value) -> ir.Value:
        """Bind an output that is not upstream of what is bound already, by looking downstream of what is.

        Returns:
            The graph value.

        Raises:
            Mismatch: No node downstream of the bound values fits.
        """
        if pattern in self._bound:
            return self._bound[pattern]
        producer = _producer(pattern)
        for index, source in enumerate(producer.inputs):
            if source is None or source not in self._bound:
                continue
            for user, user_index in self._bound[source].uses():
                if user_index != index or user.op_type != producer.op_type:
                    continue
                candidate = user.outputs[pattern.index() or 0]
                try:
                    self.unify(pattern, candidate)
                except Mismatch:
                    continue
                return candidate
        raise Mismatch(f"no {producer.op_type} that gives {_name(pattern)}")


def _same_node(left: ir.Value, right: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The pairs of inputs to unify next, if the producers are the same node."""
    pattern, node = _producer(left), right.producer()
    if node is None:
        raise Mismatch(f"{_name(right)} is an input or a weight where a {pattern.op_type} should be")
    if pattern.op_identifier() != node.op_identifier() or left.index() != right.index():
        raise Mismatch(f"{node.op_type} {_name(right)} stands where a {pattern.op_type} should")
    if not _same_attributes(pattern, node):
        raise Mismatch(f"{node.op_type} {_name(right)} has other attributes or another value")
    if len(pattern.inputs) != len(node.inputs):
        raise Mismatch(f"{node.op_type} {_name(right)} has {len(node.inputs)} inputs, not {len(pattern.inputs)}")
    pairs = []
    for a, b in zip(pattern.inputs, node.inputs, strict=True):
        if (a is None) != (b is None):
            raise Mismatch(f"{node.op_type} {_name(right)} has other optional inputs")
        if a is not None and b is not None:
            pairs.append((a, b))
    return pairs


def _same_attributes(a: ir.Node, b: ir.Node) -> bool:
    if a.attributes.keys() != b.attributes.keys():
        return False
    return all(_same_attribute(x, b.attributes[name]) for name, x in a.attributes.items())


def _same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type:
        return False
    if a.type == ir.AttributeType.TENSOR:
        left, right = a.as_tensor(), b.as_tensor()
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and bool(np.array_equal(left.numpy(), right.numpy()))
        )
    if a.type == ir.AttributeType.FLOAT:  # stored as float32
        return bool(np.float32(a.value) == np.float32(b.value))
    same: bool = a.value == b.value
    return same


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array of a ``Constant`` node's output or of a small initializer; None for anything else."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return (
            node.attributes["value"].as_tensor().numpy()
            if node.op_type == "Constant" and "value" in node.attributes
            else None
        )
    return value.const_value.numpy() if isinstance(value.const_value, ir.Tensor) else None


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise Mismatch(f"{_name(value)} is an input of the definition that is not declared")
    return node


def _name(value: ir.Value) -> str:
    return value.name or "(unnamed)"
