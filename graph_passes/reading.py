"""Reading graphs that an exporter wrote: small questions about a value, each with a reason where the answer is no."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.graph_passes.matching import Mismatch

#: Larger tensors are weights, and no constant that a pattern asks for.
_MOST_ELEMENTS = 4096


def named(value: ir.Value | None) -> str:
    """A value as reasons name it."""
    return (value.name if value is not None else None) or "(unnamed)"


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node:
    """The node that gives a value.

    Raises:
        Mismatch: It is another operator, a graph input or a weight.
    """
    node = value.producer() if value is not None else None
    if node is None:
        raise Mismatch(f"{named(value)} is an input or a weight where a {' or '.join(op_types)} should be")
    if node.domain not in ("", "ai.onnx") or node.op_type not in op_types:
        raise Mismatch(f"{node.op_type} {named(value)} stands where a {' or '.join(op_types)} should")
    return node


def operand(node: ir.Node, index: int = 0) -> ir.Value:
    """An input of a node.

    Raises:
        Mismatch: It has none there.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Mismatch(f"{node.op_type} {named(node.outputs[0])} has no input {index}")
    return value


def is_made_by(value: ir.Value | None, op_type: str) -> bool:
    """Whether a standard operator of this type gives the value."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx")


def only_user(value: ir.Value, *op_types: str) -> ir.Node:
    """The one node that takes a value.

    Raises:
        Mismatch: There are several, none, or it is another operator.
    """
    users = [node for node, _ in value.uses()]
    if len(users) != 1 or users[0].op_type not in op_types:
        raise Mismatch(f"{named(value)} is not followed by one {' or '.join(op_types)}")
    return users[0]


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The content of a small constant, whether a node, an attribute or a stored tensor has it; None for all else."""
    if value is None or value.is_graph_input():  # a caller may give another value than the stored one
        return None
    node = value.producer()
    if node is not None:
        return _array_in(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.size > _MOST_ELEMENTS:
        return None
    return tensor.numpy()


def _array_in(constant: ir.Node) -> np.ndarray | None:
    for name, attribute in constant.attributes.items():
        if name == "value" and attribute.as_tensor().dtype != ir.DataType.STRING:
            return attribute.as_tensor().numpy()
        if name in ("value_int", "value_float", "value_ints", "value_floats"):
            return np.asarray(attribute.value, np.int64 if "int" in name else np.float32)
    return None


def scalar_of(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    array = array_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def is_scalar(value: ir.Value | None, number: float) -> bool:
    """Whether a value is a constant that holds this number."""
    return scalar_of(value) == number


def ints_of(value: ir.Value | None) -> list[int] | None:
    """The integers in a constant."""
    array = array_of(value)
    return [int(x) for x in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def rows_of(inputs: Iterable[ir.Value]) -> int:
    """Rows of a batch to try a graph with: as many as its inputs are fixed to, else 2."""
    fixed = (x.shape[0] for x in inputs if x.shape is not None and len(x.shape) > 0)
    return next((size for size in fixed if isinstance(size, int)), 2)


def split_operands(node: ir.Node, *op_types: str) -> tuple[ir.Value, ir.Value]:
    """The operands of a commutative node: first the one that such a node gives.

    Raises:
        Mismatch: Neither is.
    """
    first, second = node.inputs[0], node.inputs[1]
    assert first is not None
    assert second is not None  # binary operators have both
    for one, other in ((first, second), (second, first)):
        if any(is_made_by(one, op_type) for op_type in op_types):
            return one, other
    raise Mismatch(f"no {' or '.join(op_types)} goes into {node.op_type} {named(node.outputs[0])}")


def split_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The computed operand of a product and the constant one, where there is one."""
    first, second = node.inputs[0], node.inputs[1]
    for one, other in ((first, second), (second, first)):
        number = scalar_of(other)
        if number is not None and one is not None:
            return one, number
    return None


def peel(value: ir.Value, *op_types: str) -> ir.Value:
    """Upstream along first inputs while one of these operators gives the value."""
    while (node := value.producer()) is not None and node.op_type in op_types and node.domain in ("", "ai.onnx"):
        if not node.inputs or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def require_perm(node: ir.Node, perm: Sequence[int]) -> None:
    """A Transpose must swap axes in just this way.

    Raises:
        Mismatch: It does not.
    """
    found = node.attributes.get_ints("perm", [])
    if list(found) != list(perm):
        raise Mismatch(f"Transpose {named(node.outputs[0])} has perm {list(found)}, not {list(perm)}")


def stored_matrix(value: ir.Value | None) -> LazyTensor | None:
    """The weight behind a value that is one: an initializer that no caller can replace."""
    if value is None or value.producer() is not None or value.is_graph_input():
        return None
    return value.const_value if isinstance(value.const_value, LazyTensor) else None
