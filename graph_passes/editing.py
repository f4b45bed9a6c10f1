"""Edits that several passes share: weights, functions, calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain, count
from typing import Any, NamedTuple, TypeVar

import onnx_ir as ir
from onnx_ir.passes import common

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder, initializer
from l4convert.plugins.long_context_attention import definition as attention
from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.plugins.long_context_attention.definition import Inputs as AttentionInputs

Spec = TypeVar("Spec")


class Weight(NamedTuple):
    """Where a float weight comes from: a stored tensor, through a ``Cast`` where ``dtype`` is not the tensor's."""

    name: str
    tensor: LazyTensor
    dtype: ir.DataType


class QuantizedWeight(NamedTuple):
    """A ``DequantizeLinear`` of two stored tensors: values [..,K,N], scales [..,ceil(K/block),N] (or [N])."""

    name: str
    values: LazyTensor
    scales: LazyTensor
    block_size: int


def float_weight(value: ir.Value | None) -> Weight | None:
    """The stored tensor behind a value, or None where it is computed."""
    source, dtype = value, None
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast" and node.domain == "":
        source, dtype = node.inputs[0], ir.DataType(node.attributes["to"].as_int())
    if source is None or source.producer() is not None or not isinstance(source.const_value, LazyTensor):
        return None
    return Weight(source.name or "", source.const_value, dtype or source.const_value.dtype)


def widened(b: Builder, stored: ir.Value, like: Weight) -> ir.Value:
    """A stored tensor in the type that another weight is computed with."""
    return stored if stored.dtype == like.dtype else b.op("Cast", stored, to=int(like.dtype))


def quantized_weight(value: ir.Value | None) -> QuantizedWeight | None:
    """The stored tensors behind a dequantized weight, or None where it is something else."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
        return None
    values, scales = (x.const_value if x is not None else None for x in node.inputs)
    if not isinstance(values, LazyTensor) or not isinstance(scales, LazyTensor):
        return None
    block = node.attributes.get_int("block_size", 0)
    return QuantizedWeight(node.inputs[0].name or "", values, scales, block)  # type: ignore[union-attr]


def add_initializer(graph: ir.Graph, name: str, tensor: LazyTensor) -> ir.Value:
    """Register a tensor under a name of its own (``name``, or ``name_1``, ...)."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    value = graph.initializers[unique] = initializer(unique, tensor)
    return value


def add_function(
    model: ir.Model,
    domain: str,
    op_type: str,
    spec: Any,
    inputs: Sequence[ir.Value],
    body: Builder,
    outputs: Sequence[ir.Value],
) -> str:
    """Add a model-local function whose attributes, with their values, are the fields of ``spec``; or find it there.

    Returns:
        Its overload: ``spec.overload``, numbered where a function with other attributes has that name.
    """
    attributes = ir.convenience.convert_attributes(attributes_of(spec))
    plain: str = spec.overload
    for overload in chain([plain], (f"{plain}_{number}" for number in count(2))):
        known = model.functions.get((domain, op_type, overload))
        if known is None:
            break
        if {a.name: a.value for a in known.attributes.values()} == {a.name: a.value for a in attributes}:
            return overload
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports=dict(model.graph.opset_imports), name=op_type)
    function = ir.Function(domain, op_type, overload, graph=graph, attributes=attributes)
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(domain, 1)
    return overload


def attributes_of(spec: Any) -> dict[str, Any]:
    """A spec's fields as ONNX attributes; booleans are integers there."""
    fields = dataclasses.asdict(spec)
    return {name: int(value) if isinstance(value, bool) else value for name, value in fields.items()}


def spec_of(cls: type[Spec], node: ir.Node) -> Spec:
    """A spec back from a call's attributes."""
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {name: node.attributes[name].value for name in kinds}
    return cls(**{name: bool(v) if kinds[name] == "bool" else v for name, v in values.items()})


def attention_calls(graph: ir.Graph) -> list[tuple[ir.Node, AttentionSpec, AttentionInputs]]:
    """Every call of ``l4convert::LongContextAttention`` with its attributes and its inputs by name."""
    calls = []
    for node in graph:
        if node.op_identifier()[:2] != (attention.DOMAIN, attention.OP_TYPE):
            continue
        spec = spec_of(AttentionSpec, node)
        given = dict(zip(attention.input_names(spec), node.inputs, strict=True))
        calls.append((node, spec, AttentionInputs(**{name: given.get(name) for name in AttentionInputs._fields})))  # type: ignore[arg-type]
    return calls


def replace_outputs(old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    """Let ``new`` stand for ``old`` everywhere, graph outputs included, under the same names."""
    for before, after in zip(old, new, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.name = f"{before.name}/replaced"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def replace_node(graph: ir.Graph, node: ir.Node, b: Builder, outputs: Sequence[ir.Value], domain: str = "") -> None:
    """Put the nodes of a builder in the place of one node.

    Args:
        outputs: What stands for the node's outputs now.
        domain: A domain that the new nodes need beside the standard one.
    """
    graph.insert_before(node, b.nodes)
    replace_outputs(node.outputs, outputs)
    if domain:
        graph.opset_imports.setdefault(domain, 1)


def clean_up(model: ir.Model) -> None:
    """Order nodes by their dependencies and drop what nothing uses any more: nodes, weights, functions, opsets."""
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # the library leaves it untyped
    common.RemoveUnusedOpsetsPass()(model)


def map_weight(
    b: Builder, graph: ir.Graph, value: ir.Value | None, layout: Callable[[LazyTensor], LazyTensor]
) -> ir.Value | None:
    """The same weight with its K axis last and then laid out by ``layout``: float, or still dequantized in the graph.

    Args:
        b: Receives the ``Cast`` or ``DequantizeLinear`` of the new tensors.
        graph: Receives the new tensors.
        value: A weight [..,K,N].
        layout: Maps a tensor [..,N,*] to another with the same last axis.

    Returns:
        The new value, or None where ``value`` is not a stored weight.
    """
    weight = float_weight(value)
    if weight is not None:
        stored = add_initializer(graph, f"{weight.name}_nk", layout(transposed(weight.tensor)))
        return widened(b, stored, weight)
    quantized = quantized_weight(value)
    if quantized is None or len(quantized.scales.dims) != len(quantized.values.dims):
        return None
    values = add_initializer(graph, f"{quantized.name}_nk", layout(transposed(quantized.values)))
    scales = add_initializer(graph, f"{quantized.name}_nk_scale", layout(transposed(quantized.scales)))
    last = len(quantized.values.dims) - 1
    return b.op("DequantizeLinear", values, scales, axis=last, block_size=quantized.block_size)
