"""The form of a graph that ONNX Runtime's CPU provider can run: bfloat16 arithmetic in float32, rounded as before.

The CPU provider moves bfloat16 data but has no arithmetic on it (1.31). So each such operator is put between casts: its
inputs are widened, which is exact, and its results are rounded to bfloat16. What the graph rounds is still rounded, so
what a bfloat16 graph loses shows here too. What only CUDA's kernels do becomes other nodes (``cuda_kernels``). The file
is not changed; float32 and float16 graphs of other targets run as they are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from l4convert.errors import InputError
from l4convert.runtime.cuda_kernels import replace_cuda_kernels

# What the CPU provider does with bfloat16 as it is: it looks at no element.
_MOVES = {
    *("Cast", "Concat", "Gather", "GatherND", "Identity", "Reshape", "ScatterElements", "ScatterND", "Slice"),
    *("Split", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze"),
}
# Results whose type does not follow from that of the operands.
_OTHER_TYPE = {
    *("Shape", "Size", "ArgMax", "QuantizeLinear"),
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf"),
}


def cpu_form_of(file: Path) -> bytes:
    """The model of a file, rewritten; its weights are still those of the files beside it.

    Raises:
        InputError: The file is not an ONNX model.
    """
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's and onnx_ir's exceptions have no common base
        raise InputError(f"{file}: not an ONNX model: {error}") from error
    to_cpu_form(model)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def to_cpu_form(model: ir.Model) -> None:
    """Rewrite a model in place; calls of functions are inlined on the way."""
    common.InlinePass()(model)
    replace_cuda_kernels(model)
    _Widening().graph(model.graph, set())


class _Widening:
    """Walks graphs in order and knows which values are bfloat16."""

    def __init__(self) -> None:
        self._widened: Counter[str | None] = Counter()

    def graph(self, graph: ir.Graph, outer: set[ir.Value]) -> set[ir.Value]:
        """Rewrite one graph; ``outer``: the bfloat16 values that it sees from outside. Returns all that are."""
        narrow = outer | {
            value for value in (*graph.inputs, *graph.initializers.values()) if value.dtype == ir.DataType.BFLOAT16
        }
        wide: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            self.node(graph, node, narrow, wide)
        return narrow

    def node(self, graph: ir.Graph, node: ir.Node, narrow: set[ir.Value], wide: dict[ir.Value, ir.Value]) -> None:
        if node.op_type in {"If", "Loop"}:
            self.subgraphs(node, narrow)
            return
        if not _is_narrow(node, narrow):
            if node.op_type != "Cast" and any(value in narrow for value in node.inputs):
                self.widen_inputs(graph, node, narrow, wide)
            return
        if node.op_type in _MOVES and node.domain == "":
            narrow.update(node.outputs[:1] if node.op_type != "Split" else node.outputs)
            return
        if node.op_type == "Constant":
            narrow.add(node.outputs[0])
            return
        self.widen_inputs(graph, node, narrow, wide)
        narrow.update(self.round_outputs(graph, node))

    def subgraphs(self, node: ir.Node, narrow: set[ir.Value]) -> None:
        """Bodies of loops and branches; what they give back is what goes in, or what both branches have."""
        for attribute in node.attributes.values():
            if attribute.type != ir.AttributeType.GRAPH:
                continue
            body = attribute.as_graph()
            inside = set(narrow)
            if node.op_type == "Loop":
                carried = zip(node.inputs[2:], body.inputs[2:], strict=True)
                inside |= {inner for outer, inner in carried if outer in narrow}
            known = self.graph(body, inside)
            results = body.outputs[1:] if node.op_type == "Loop" else body.outputs
            narrow.update(out for out, inner in zip(node.outputs, results, strict=True) if inner in known)

    def widen_inputs(
        self, graph: ir.Graph, node: ir.Node, narrow: set[ir.Value], wide: dict[ir.Value, ir.Value]
    ) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value not in narrow:
                continue
            if value not in wide:
                # Branches, and a loop's body and the graph around it, may all widen one value: each cast has a name.
                self._widened[value.name] += 1
                cast = _cast(value, ir.DataType.FLOAT, f"{value.name}/widened_{self._widened[value.name]}")
                graph.insert_before(node, cast)
                wide[value] = cast.outputs[0]
            node.replace_input_with(index, wide[value])

    def round_outputs(self, graph: ir.Graph, node: ir.Node) -> list[ir.Value]:
        rounded = []
        # Of several results the first is a number of the type; attention's others are its caches.
        for value in node.outputs if _gives_float_caches(node) else node.outputs[:1]:
            name, shape = value.name, value.shape
            cast = _cast(value, ir.DataType.BFLOAT16, f"{name}/rounded")
            result = cast.outputs[0]
            ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
            cast.replace_input_with(0, value)
            value.name, value.type = f"{name}/unrounded", ir.TensorType(ir.DataType.FLOAT)
            result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.BFLOAT16), shape
            graph.insert_after(node, cast)
            rounded.append(result)
        return rounded


def _is_narrow(node: ir.Node, narrow: set[ir.Value]) -> bool:
    """Whether a node's first result is bfloat16."""
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() == ir.DataType.BFLOAT16
    if node.op_type == "Constant":
        value = node.attributes.get("value")
        return value is not None and value.as_tensor().dtype == ir.DataType.BFLOAT16
    if node.op_type in _OTHER_TYPE and node.domain == "":
        return False
    return any(value in narrow for value in node.inputs if value is not None)


def _gives_float_caches(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and node.attributes.get_string("k_quant_type", "NONE") == "NONE"


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    attribute = ir.AttrInt64("to", int(dtype))
    return ir.Node("", "Cast", [value], attributes=[attribute], outputs=[output], name=name)
