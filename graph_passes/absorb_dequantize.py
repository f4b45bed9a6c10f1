"""Absorb dequantization: ``l4convert::MoE`` takes its quantized weights as they are stored, with their scales.

For plugins, which read 4-bit weights themselves: a ``DequantizeLinear`` in front of the call would be a tensor of 16
bits. The function's body now begins with it, so a runtime without the plugin still computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    add_function,
    attributes_of,
    clean_up,
    quantized_weight,
    replace_node,
    spec_of,
)
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe import definition
from l4convert.plugins.moe.definition import Inputs, MoESpec
from l4convert.quantization.recipe import Recipe

WEIGHTS = ("gate_up", "down")
#: Inputs of a call that takes quantized weights.
QUANTIZED_INPUTS = ("x", "router_logits", "gate_up", "gate_up_scale", "down", "down_scale")


@dataclass(frozen=True)
class QuantizedMoESpec(MoESpec):
    """The attributes of a call with quantized weights.

    Attributes:
        gate_up_block, down_block: Weights along K that share a scale.
    """

    gate_up_block: int = 0
    down_block: int = 0

    @property
    def overload(self) -> str:
        """As that of :class:`MoESpec`, with the block sizes."""
        return f"{super().overload}_blocks{self.gate_up_block}_{self.down_block}"


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite every call of ``l4convert::MoE`` whose two weights are dequantized from stored tensors."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n) and len(n.inputs) == len(Inputs._fields)]:
        inputs = Inputs(*node.inputs)  # type: ignore[arg-type]
        dequantizes = [getattr(inputs, name).producer() for name in WEIGHTS]
        quantized = [quantized_weight(getattr(inputs, name)) for name in WEIGHTS]
        if any(weight is None or not weight.block_size for weight in quantized):
            outcome.skip(node.name, "its weights are not quantized in blocks")
            continue
        blocks = {f"{name}_block": weight.block_size for name, weight in zip(WEIGHTS, quantized, strict=True) if weight}
        spec = QuantizedMoESpec(**{**vars(spec_of(MoESpec, node)), **blocks})
        stored = [value for dequantize in dequantizes for value in dequantize.inputs]
        b = Builder(node.name or "moe")
        output = b.node(
            definition.OP_TYPE,
            [inputs.x, inputs.router_logits, *stored],
            name="quantized",
            domain=definition.DOMAIN,
            overload=_declare(model, spec),
            **attributes_of(spec),
        )
        replace_node(model.graph, node, b, output, definition.DOMAIN)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _declare(model: ir.Model, spec: QuantizedMoESpec) -> str:
    """Add the function of a spec to the model, unless it is there; returns its overload."""
    body = Builder()
    values = {name: ir.Value(name=name) for name in QUANTIZED_INPUTS}
    blocks = (spec.gate_up_block, spec.down_block)
    weights = [
        body.op("DequantizeLinear", values[name], values[f"{name}_scale"], axis=1, block_size=block)
        for name, block in zip(WEIGHTS, blocks, strict=True)
    ]
    output = definition.build(body, spec, Inputs(values["x"], values["router_logits"], *weights))
    return add_function(model, definition.DOMAIN, definition.OP_TYPE, spec, list(values.values()), body, [output])
