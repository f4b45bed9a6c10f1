"""Lower MoE to QMoE: ONNX Runtime's kernels, ``QMoE`` for INT4 experts and ``MoE`` for all other weights.

The kernels scale an expert's output by its score and Llama 4 scales its input, so the input is scaled in front and the
kernel is told to use weight 1 (its scores, normalised over the one expert that it picks). With top-k > 1 each chosen
expert gets a row of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import InterleavedHalves, transposed
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import (
    QuantizedWeight,
    add_initializer,
    clean_up,
    map_weight,
    quantized_weight,
    replace_node,
    spec_of,
)
from l4convert.graph_passes.quantize_weights import is_moe
from l4convert.plugins.moe.definition import Inputs, MoESpec
from l4convert.quantization import layouts
from l4convert.quantization.recipe import Recipe

CONTRIB = "com.microsoft"
# swiglu_fusion 1: rows of gate and up alternate. alpha 1 and beta 0 make the kernel's SwiGLU ``silu(gate) * up``.
SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
    "k": 1,
}


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Replace every call of ``l4convert::MoE`` that a kernel can do."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n)]:
        spec = spec_of(MoESpec, node)
        inputs = Inputs(*node.inputs)  # type: ignore[arg-type]
        if spec.activations:
            outcome.skip(node.name, "the kernel cannot round activations between its two matrix products")
            continue
        b = Builder(node.name or "moe")
        experts = _experts(b, model.graph, inputs)
        if experts is None:
            outcome.skip(node.name, "the experts' weights are not stored tensors")
            continue
        output = _route(b, spec, inputs, experts)
        replace_node(model.graph, node, b, [output], CONTRIB)
        outcome.fired += 1
    clean_up(model)
    return outcome


class _Kernel:
    """A kernel with its weights bound; called with rows and their router logits."""

    def __init__(self, op_type: str, weights: list[ir.Value | None], **attributes: Any) -> None:
        self.op_type, self.weights, self.attributes = op_type, weights, attributes

    def __call__(self, b: Builder, rows: ir.Value, logits: ir.Value) -> ir.Value:
        inputs = [rows, logits, *self.weights]
        return b.node(self.op_type, inputs, domain=CONTRIB, **SWIGLU, **self.attributes)[0]


def _experts(b: Builder, graph: ir.Graph, inputs: Inputs) -> _Kernel | None:
    gate_up, down = quantized_weight(inputs.gate_up), quantized_weight(inputs.down)
    if gate_up is not None and down is not None and _fit_qmoe(gate_up, down):
        return _int4_kernel(graph, gate_up, down)
    float_gate_up = map_weight(b, graph, inputs.gate_up, InterleavedHalves)
    float_down = map_weight(b, graph, inputs.down, lambda tensor: tensor)
    if float_gate_up is None or float_down is None:
        return None
    return _Kernel("MoE", [float_gate_up, None, float_down])


def _fit_qmoe(gate_up: QuantizedWeight, down: QuantizedWeight) -> bool:
    """QMoE wants INT4, one block size, and both widths divisible by it (its schema's text)."""
    return gate_up.block_size == down.block_size and all(
        weight.values.dtype == ir.DataType.INT4 and weight.values.dims[-2] % weight.block_size == 0
        for weight in (gate_up, down)
    )


def _int4_kernel(graph: ir.Graph, gate_up: QuantizedWeight, down: QuantizedWeight) -> _Kernel:
    inputs: list[ir.Value | None] = []
    for weight, interleave in ((gate_up, True), (down, False)):
        values, scales = transposed(weight.values), transposed(weight.scales)
        if interleave:
            values, scales = InterleavedHalves(values), InterleavedHalves(scales)
        inputs.append(add_initializer(graph, f"{weight.name}_packed", layouts.qmoe(values)))
        inputs.append(add_initializer(graph, f"{weight.name}_packed_scale", scales))
        inputs.append(None)  # bias
    return _Kernel("QMoE", inputs[:-1], expert_weight_bits=4, block_size=gate_up.block_size)


def _route(b: Builder, spec: MoESpec, inputs: Inputs, kernel: _Kernel) -> ir.Value:
    if spec.top_k == 1:
        best = b.op("ReduceMax", inputs.router_logits, b.constant([1]), keepdims=1)
        return kernel(b, b.op("Mul", inputs.x, b.op("Sigmoid", best)), inputs.router_logits)
    top, index = b.node("TopK", [inputs.router_logits, b.constant([spec.top_k])], outputs=2, axis=-1)
    scores = b.op("Unsqueeze", b.op("Sigmoid", top), b.constant([2]))
    rows = b.op("Mul", b.op("Unsqueeze", inputs.x, b.constant([1])), scores)
    chosen = b.op(
        "OneHot", b.reshape(index, [-1]), b.constant(spec.num_experts), b.constant([0.0, 1.0], np.float32), axis=-1
    )
    outputs = kernel(b, b.reshape(rows, [-1, spec.hidden_size]), chosen)
    grouped = b.reshape(outputs, [-1, spec.top_k, spec.hidden_size])
    return b.op("ReduceSum", grouped, b.constant([1]), keepdims=0)
