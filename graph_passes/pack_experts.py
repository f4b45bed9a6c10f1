"""Pack experts: ``l4convert::MoE`` takes its quantized weights as the plugin's kernels read them, with their scales.

Words of codes, K last (plugins/moe/layout.py): a ``DequantizeLinear`` in front of the call would be a tensor of 16
bits. The function's body now begins with the unpacking, so a runtime without the plugin computes the same, bit for bit.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    QuantizedWeight,
    add_function,
    add_initializer,
    attributes_of,
    clean_up,
    quantized_weight,
    replace_node,
    spec_of,
)
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe import definition, layout, packed
from l4convert.plugins.moe.definition import Inputs, MoESpec
from l4convert.quantization import layouts
from l4convert.quantization.recipe import Recipe

WEIGHTS = ("gate_up", "down")
#: Most elements of a tensor (TensorRT's limit).
MOST_ELEMENTS = (1 << 31) - 1

Stored = Literal["int4", "fp8"]
_STORED: dict[ir.DataType, Stored] = {ir.DataType.INT4: "int4", ir.DataType.FLOAT8E4M3FN: "fp8"}


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every call of ``l4convert::MoE`` whose two weights are quantized in a form that the kernels have."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n) and len(n.inputs) == len(Inputs._fields)]:
        inputs, plain = Inputs(*node.inputs), spec_of(MoESpec, node)  # type: ignore[arg-type]
        weights = {name: quantized_weight(getattr(inputs, name)) for name in WEIGHTS}
        reason = _refusal(plain, weights)
        if reason is not None:
            outcome.skip(node.name, reason)
            continue
        found = {name: weight for name, weight in weights.items() if weight is not None}
        spec = packed.PackedMoESpec(
            **vars(plain),
            weights=_STORED[found["gate_up"].values.dtype],
            gate_up_block=found["gate_up"].block_size,
            down_block=found["down"].block_size,
        )
        stored = [value for weight in found.values() for value in _stored(model.graph, weight)]
        b = Builder(node.name or "moe")
        output = b.node(
            definition.OP_TYPE,
            [inputs.x, inputs.router_logits, *stored],
            name="packed",
            domain=definition.DOMAIN,
            overload=_declare(model, spec),
            **attributes_of(spec),
        )
        replace_node(model.graph, node, b, output, definition.DOMAIN)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _refusal(spec: MoESpec, weights: dict[str, QuantizedWeight | None]) -> str | None:
    """Why the kernels cannot take these weights; None where they can."""
    found = [weight for weight in weights.values() if weight is not None and weight.block_size]
    if len(found) != len(WEIGHTS):
        return "its weights are not quantized in blocks"
    kinds = {_STORED.get(weight.values.dtype) for weight in found}
    if len(kinds) != 1 or None in kinds:
        return "its two weights are quantized in different ways"
    kind = kinds.pop()
    if (kind == "fp8") != (spec.activations == "fp8"):
        return f"no kernel has {kind} weights with {spec.activations or 'unrounded'} activations"
    return next((reason for weight in found if (reason := _misfit(weight)) is not None), None)


def _misfit(weight: QuantizedWeight) -> str | None:
    _, depth, width = weight.values.dims
    if depth % layout.GROUP or width % layout.GROUP or depth % weight.block_size:
        need = f"multiples of {layout.GROUP}, and blocks of {weight.block_size}"
        return f"{weight.name} is {depth} x {width}: the kernels take {need}"
    if _layout(weight).size > MOST_ELEMENTS:
        return f"{weight.name} has more than {MOST_ELEMENTS} words, which no TensorRT tensor may have"
    return None


def _layout(weight: QuantizedWeight) -> LazyTensor:
    """The weight's codes [E,K,N] as the kernels read them."""
    k_last = transposed(weight.values)
    if _STORED[weight.values.dtype] == "int4":
        return layouts.ordered_words(k_last, layout.GROUP, layout.K_ORDER)
    return layouts.long_words(k_last)


def _stored(graph: ir.Graph, weight: QuantizedWeight) -> tuple[ir.Value, ir.Value]:
    words = add_initializer(graph, f"{weight.name}_packed", _layout(weight))
    return words, add_initializer(graph, f"{weight.name}_packed_scale", weight.scales)


def _declare(model: ir.Model, spec: packed.PackedMoESpec) -> str:
    """Add the function of a spec to the model, unless it is there; returns its overload."""
    body = Builder()
    inputs = packed.Inputs(*(ir.Value(name=name) for name in packed.Inputs._fields))
    output = packed.build(body, spec, inputs)
    return add_function(model, definition.DOMAIN, definition.OP_TYPE, spec, inputs, body, [output])
