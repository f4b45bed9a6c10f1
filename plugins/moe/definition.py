"""The definition of ``l4convert::MoE`` as plain ONNX: the frontend writes it, passes match it.

Inputs (T tokens, H hidden, E experts, I expert width):
    x [T,H]; router_logits [T,E], float32; gate_up [E,H,2I] (gate first); down [E,I,H].
All but the logits are of the type ``spec.compute``; scores and SwiGLU are float32 inside.
Output: y [T,H], the sum over the top-k experts of ``down(silu(gate(s*x)) * up(s*x))`` with ``s = sigmoid(logit)``. The
score scales the expert's *input* (transformers ``Llama4TextMoe.forward``). An expert that was not chosen gets zeros and
gives zeros, so the plain form may compute all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import ComputeType, from_float32, to_float32
from l4convert.quantization.activations import round_per_token

DOMAIN = "l4convert"
OP_TYPE = "MoE"
Activations = Literal["", "fp8"]


@dataclass(frozen=True)
class MoESpec:
    """The attributes of the op.

    Attributes:
        num_experts, hidden_size, intermediate_size: E, H and I.
        top_k: Experts a token is sent to.
        activations: "fp8": the inputs of both matrix products are rounded to E4M3 with one scale a token.
        compute: The type of x, weights and output.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    activations: Activations = ""
    compute: ComputeType = "float32"

    @property
    def overload(self) -> str:
        """Names the function among the variants of the op."""
        narrow = "" if self.compute == "float32" else self.compute
        return "_".join(filter(None, [f"e{self.num_experts}", f"top{self.top_k}", self.activations, narrow]))


class Inputs(NamedTuple):
    """The op's inputs in order."""

    x: ir.Value
    router_logits: ir.Value
    gate_up: ir.Value
    down: ir.Value


class Expert(NamedTuple):
    """One expert's weights in unfused form: gate and up [H,I], down [I,H]."""

    gate: ir.Value
    up: ir.Value
    down: ir.Value


def build(b: Builder, spec: MoESpec, inputs: Inputs) -> ir.Value:
    """Append the op as plain ONNX nodes over stacked weights."""
    scores = router_scores(b, spec, inputs.router_logits)
    per_expert = b.op("Unsqueeze", b.op("Transpose", scores, perm=[1, 0]), b.constant([2]))
    x = b.op("Unsqueeze", to_float32(b, inputs.x, spec.compute), b.constant([0]))
    scaled = from_float32(b, b.op("Mul", x, per_expert), spec.compute)
    gate_up = b.op("MatMul", _rounded(b, spec, scaled, spec.hidden_size), inputs.gate_up)
    gate, up = b.node("Split", [gate_up], outputs=2, axis=-1, num_outputs=2)
    hidden = swiglu(b, gate, up, spec.compute)
    routed = b.op("MatMul", _rounded(b, spec, hidden, spec.intermediate_size), inputs.down)
    return b.op("ReduceSum", routed, b.constant([0]), keepdims=0)


def build_unfused(
    b: Builder, spec: MoESpec, x: ir.Value, router_logits: ir.Value, experts: Sequence[Expert]
) -> ir.Value:
    """The same with a matrix product of its own for every expert, as unfused checkpoints and exporters have it."""
    scores = router_scores(b, spec, router_logits)
    total: ir.Value | None = None
    for number, expert in enumerate(experts):
        score = b.op("Gather", scores, b.constant([number]), axis=1)
        scaled = from_float32(b, b.op("Mul", to_float32(b, x, spec.compute), score), spec.compute)
        hidden = swiglu(b, b.op("MatMul", scaled, expert.gate), b.op("MatMul", scaled, expert.up), spec.compute)
        routed = b.op("MatMul", hidden, expert.down)
        total = routed if total is None else b.op("Add", total, routed)
    assert total is not None  # a model without experts has no MoE layer
    return total


def router_scores(b: Builder, spec: MoESpec, router_logits: ir.Value) -> ir.Value:
    """[T,E]: sigmoid of the top-k logits, 0 elsewhere."""
    top, index = b.node("TopK", [router_logits, b.constant([spec.top_k])], outputs=2, axis=-1)
    zeros = b.op("ConstantOfShape", b.op("Shape", router_logits), value=ir.tensor(np.zeros(1, np.float32)))
    return b.op("ScatterElements", zeros, index, b.op("Sigmoid", top), axis=1)


def swiglu(b: Builder, gate: ir.Value, up: ir.Value, compute: ComputeType) -> ir.Value:
    """``silu(gate) * up``, computed in float32."""
    gate, up = (to_float32(b, x, compute) for x in (gate, up))
    return from_float32(b, b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up), compute)


def _rounded(b: Builder, spec: MoESpec, value: ir.Value, width: int) -> ir.Value:
    return round_per_token(b, value, width, spec.compute) if spec.activations else value
