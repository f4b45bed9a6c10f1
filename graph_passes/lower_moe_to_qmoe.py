"""Lower MoE to QMoE: ONNX Runtime's kernels, ``QMoE`` for INT4 experts and ``MoE`` for all other weights.

The kernels scale an expert's output by its score and Llama 4 scales its input, so the input is scaled in front and the
kernel is told to use weight 1 (its scores, normalised over the one expert that it picks). With top-k > 1 each chosen
expert gets a row of its own.

Where the graph computes in a narrow type the kernels' router input has that type, too, and rounded logits could name
another expert. So there they get a table of zeros with a one where the best of the float32 logits is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import InterleavedHalves, transposed
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, from_float32, to_float32
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
from l4convert.graph_passes.providers import CPU, Provider
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


def run(model: ir.Model, recipe: Recipe, provider: Provider = CPU) -> Outcome:
    """Replace every call of ``l4convert::MoE`` that a kernel can do."""
    outcome = Outcome()
    for node in [n for n in model.graph if is_moe(n)]:
        spec = spec_of(MoESpec, node)
        inputs = Inputs(*node.inputs)  # type: ignore[arg-type]
        if spec.activations:
            outcome.skip(node.name, "the kernel cannot round activations between its two matrix products")
            continue
        b = Builder(node.name or "moe")
        experts = _experts(b, model.graph, inputs, provider)
        if isinstance(experts, str):
            outcome.skip(node.name, experts)
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


def _experts(b: Builder, graph: ir.Graph, inputs: Inputs, provider: Provider) -> _Kernel | str:
    """The kernel, or why there is none."""
    gate_up, down = quantized_weight(inputs.gate_up), quantized_weight(inputs.down)
    if gate_up is not None and down is not None:
        reason = _refusal(gate_up, down, provider)
        if reason is None:
            return _int4_kernel(graph, gate_up, down, provider)
        if not provider.dequantizes_experts:
            return reason
    float_gate_up = map_weight(b, graph, inputs.gate_up, InterleavedHalves)
    float_down = map_weight(b, graph, inputs.down, lambda tensor: tensor)
    if float_gate_up is None or float_down is None:
        return "the experts' weights are not stored tensors"
    return _Kernel("MoE", [float_gate_up, None, float_down])


def _refusal(gate_up: QuantizedWeight, down: QuantizedWeight, provider: Provider) -> str | None:
    """Why QMoE cannot take these weights; None where it can."""
    if any(weight.values.dtype != ir.DataType.INT4 for weight in (gate_up, down)):
        # Its FP8 forms have one scale an expert, or one a square block (its schema's text), and the released CUDA
        # library is built without them (ADR 0016).
        return "QMoE has no FP8 weights with one scale a column"
    if gate_up.block_size != down.block_size:
        return "QMoE has one block size for both matrices"
    hidden, intermediate = gate_up.values.dims[-2], down.values.dims[-2]
    return provider.refuses_qmoe(gate_up.block_size, hidden, intermediate)


def _int4_kernel(graph: ir.Graph, gate_up: QuantizedWeight, down: QuantizedWeight, provider: Provider) -> _Kernel:
    inputs: list[ir.Value | None] = []
    for weight, interleave in ((gate_up, True), (down, False)):
        values, scales = transposed(weight.values), transposed(weight.scales)
        if interleave:
            values, scales = InterleavedHalves(values), InterleavedHalves(scales)
        inputs.append(add_initializer(graph, f"{weight.name}_packed", layouts.qmoe(values)))
        inputs.append(add_initializer(graph, f"{weight.name}_packed_scale", scales))
        inputs.append(None)  # bias
    attributes = {"expert_weight_bits": 4, "block_size": gate_up.block_size, **provider.qmoe_attributes}
    return _Kernel("QMoE", inputs[:-1], **attributes)


def _route(b: Builder, spec: MoESpec, inputs: Inputs, kernel: _Kernel) -> ir.Value:
    logits, x = inputs.router_logits, to_float32(b, inputs.x, spec.compute)
    dtype = COMPUTE_TYPES[spec.compute]
    if spec.top_k == 1:
        best = b.op("ReduceMax", logits, b.constant([1]), keepdims=1)
        rows = from_float32(b, b.op("Mul", x, b.op("Sigmoid", best)), spec.compute)
        narrow = spec.compute != "float32"
        return kernel(b, rows, b.op("Cast", b.op("Equal", logits, best), to=int(dtype)) if narrow else logits)
    top, index = b.node("TopK", [logits, b.constant([spec.top_k])], outputs=2, axis=-1)
    scores = b.op("Unsqueeze", b.op("Sigmoid", top), b.constant([2]))
    rows = from_float32(b, b.op("Mul", b.op("Unsqueeze", x, b.constant([1])), scores), spec.compute)
    table = b.op(
        "OneHot", b.reshape(index, [-1]), b.constant(spec.num_experts), b.constant([0.0, 1.0], np.float32), axis=-1
    )
    outputs = kernel(b, b.reshape(rows, [-1, spec.hidden_size]), from_float32(b, table, spec.compute))
    grouped = b.reshape(outputs, [-1, spec.top_k, spec.hidden_size])
    return b.op("ReduceSum", grouped, b.constant([1]), keepdims=0)
