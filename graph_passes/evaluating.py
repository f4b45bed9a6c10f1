"""Evaluate a small part of a graph: what follows from shapes and an attention mask alone, with onnx's own reference.

That is how a pass finds out what a mask lets through, however an exporter wrote it down: the part is computed for many
small inputs and compared with a closed form. Only operators that move, count and compare are let in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.reading import array_of, named

_OPERATORS = {
    *("Shape", "Size", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Concat", "Slice", "Gather", "GatherND", "Tile"),
    *("Transpose", "Identity", "Constant", "ConstantOfShape", "Range", "Cast", "CumSum", "Trilu"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Max", "Min", "Floor"),
    *("ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "Where", "And", "Or", "Not", "Xor", "IsNaN"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
}
_MOST_NODES = 500
# The largest constant that the inputs tried here tell apart from others, and where the ends of open slices begin.
_LARGEST = 4
_ENDLESS = (1 << 31) - 2


class Part:
    """The nodes that a value follows from.

    Attributes:
        value: What is computed.
        nodes: In order.
        data: Graph inputs whose content is looked at.
        shapes: Graph inputs of which only the shape is.

    Raises:
        Mismatch: Something else goes in: weights, activations, or an operator that does more than move and compare.
    """

    def __init__(self, value: ir.Value) -> None:
        self.value = value
        self.nodes: list[ir.Node] = []
        self.data: list[ir.Value] = []
        self.shapes: list[ir.Value] = []
        self._collect()

    def _collect(self) -> None:
        order: dict[ir.Node, None] = {}
        stack: list[tuple[ir.Value, bool]] = [(self.value, False)]
        while stack:
            value, shape_only = stack.pop()
            node = value.producer()
            if node is None:
                self._leaf(value, shape_only)
                continue
            if node in order:
                continue
            if node.domain not in ("", "ai.onnx") or node.op_type not in _OPERATORS:
                raise Mismatch(f"{named(self.value)} depends on {node.op_type} {named(value)}")
            order[node] = None
            if len(order) > _MOST_NODES:
                raise Mismatch(f"{named(self.value)} is computed by more than {_MOST_NODES} nodes")
            stack += [(x, node.op_type == "Shape") for x in node.inputs if x is not None]
        self.nodes = _sorted(list(order))

    def _leaf(self, value: ir.Value, shape_only: bool) -> None:
        if value.is_graph_input():
            kind = self.shapes if shape_only else self.data
            if value not in kind:
                kind.append(value)
        elif array_of(value) is None:
            raise Mismatch(f"{named(self.value)} depends on the weight {named(value)}")

    def divisors(self) -> list[ir.Value]:
        """The integer constants above 1 that something is divided by, each once."""
        found: list[ir.Value] = []
        for node in self.nodes:
            if node.op_type not in ("Div", "Mod"):
                continue
            divisor = node.inputs[1]
            array = array_of(divisor)
            if array is None or array.size != 1 or array.dtype.kind not in "iu" or int(array.reshape(-1)[0]) < 2:
                raise Mismatch(f"{named(self.value)} is divided by something other than a constant")
            if divisor is not None and divisor not in found:
                found.append(divisor)
        return found

    def require_small_constants(self) -> None:
        """Refuse numbers that small inputs would not reach: a window's width, say.

        Raises:
            Mismatch: One is there, besides what is divided by and the ends of slices.
        """
        dividing = self.divisors()
        for value in {x for node in self.nodes for x in node.inputs if x is not None and x not in dividing}:
            array = array_of(value)
            if array is None or array.dtype.kind not in "iuf":
                continue
            for number in np.abs(array.reshape(-1).astype(np.float64)):
                if _LARGEST < number < _ENDLESS:
                    raise Mismatch(f"{named(self.value)} depends on the number {number:g}")

    def evaluator(self) -> Evaluator:
        """Ready to compute the value for inputs."""
        return Evaluator(self)


class Evaluator:
    """Computes a part's value; making it is slow beside calling it."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._constants = {
            x: array
            for node in part.nodes
            for x in node.inputs
            if x is not None and x.producer() is None and not x.is_graph_input() and (array := array_of(x)) is not None
        }

    def __call__(
        self, feeds: Mapping[ir.Value, np.ndarray], instead: Mapping[ir.Value, int] | None = None
    ) -> np.ndarray:
        """Compute.

        Args:
            feeds: Every graph input that the part looks at.
            instead: Constants that something is divided by, and what to divide by instead.

        Raises:
            Mismatch: onnx's reference cannot compute it.
        """
        from onnx.reference import ReferenceEvaluator

        known: dict[ir.Value, Any] = {**self._constants, **feeds}
        try:
            for node in self._part.nodes:
                self._run(ReferenceEvaluator, node, known, instead or {})
        except Mismatch:
            raise
        except Exception as error:  # whatever numpy or the reference make of shapes that do not fit
            raise Mismatch(f"{named(self._part.value)} cannot be computed: {type(error).__name__}") from error
        result: np.ndarray = np.asarray(known[self._part.value])
        return result

    def _run(self, reference: Any, node: ir.Node, known: dict[ir.Value, Any], instead: Mapping[ir.Value, int]) -> None:
        inputs: dict[str, np.ndarray] = {}
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            array = known[value]
            if index == 1 and value in instead and node.op_type in ("Div", "Mod"):
                array = np.full_like(array, instead[value])
            inputs[f"x{index}"] = array
        session = _session(reference, node, known)
        for value, array in zip(node.outputs, session.run(None, inputs), strict=True):
            known[value] = np.asarray(array)


_SESSIONS = "l4convert.reference"


def _session(reference: Any, node: ir.Node, known: Mapping[ir.Value, Any]) -> Any:
    """An evaluator for one node, kept with it: the node does not change while it is looked at."""
    if _SESSIONS not in node.meta:
        import onnx

        inputs = [f"x{i}" if x is not None else "" for i, x in enumerate(node.inputs)]
        outputs = [f"y{i}" for i in range(len(node.outputs))]
        proto = ir.to_proto(node)
        proto.input[:], proto.output[:] = inputs, outputs
        version = node.graph.opset_imports.get("", 23) if node.graph is not None else 23
        infos = [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(np.asarray(known[x]).dtype), None
            )
            for name, x in zip(inputs, node.inputs, strict=True)
            if x is not None
        ]
        graph = onnx.helper.make_graph([proto], "part", infos, [onnx.ValueInfoProto(name=name) for name in outputs])
        opsets = [onnx.helper.make_opsetid("", version)]
        node.meta[_SESSIONS] = reference(onnx.helper.make_model(graph, opset_imports=opsets))
    return node.meta[_SESSIONS]


def _sorted(nodes: list[ir.Node]) -> list[ir.Node]:
    """In the order of their dependencies."""
    wanted, done, result = set(nodes), set(), []
    for first in nodes:
        stack = [(first, False)]
        while stack:
            node, ready = stack.pop()
            if node in done:
                continue
            if ready:
                done.add(node)
                result.append(node)
                continue
            stack.append((node, True))
            producers = (x.producer() for x in node.inputs if x is not None)
            stack += [(producer, False) for producer in producers if producer is not None and producer in wanted]
    return result
