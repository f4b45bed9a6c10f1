"""Quantize weights: stored weights of matrix products become ``DequantizeLinear`` of INT4 or FP8 values.

The recipe decides by the weight's canonical name. For FP8 with dynamic activations, the other operand is rounded token
by token with ``QuantizeLinear``/``DequantizeLinear``.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from l4convert.checkpoint.combiners import Reshaped, cast, transposed
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import compute_type
from l4convert.graph_passes import fuse_experts
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import Weight, add_initializer, clean_up, float_weight, spec_of
from l4convert.plugins.moe import definition as moe
from l4convert.plugins.moe.definition import MoESpec
from l4convert.quantization.activations import round_per_token
from l4convert.quantization.carry_over import stored_kinds, stored_scheme, take_over
from l4convert.quantization.fp8 import quantize_fp8
from l4convert.quantization.int4 import quantize_int4
from l4convert.quantization.recipe import STORED, Recipe, Scheme

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Visit every matrix product; a weight that two of them share is quantized once."""
    outcome = Outcome()
    quantizer = _Quantizer(model, recipe, outcome)
    for node in list(model.graph):
        for index in weight_inputs(node):
            quantizer.visit(node, index)
        if is_moe(node):
            quantizer.round_expert_inputs(node)
    quantizer.skip_rest()
    clean_up(model)
    return outcome


def is_moe(node: ir.Node) -> bool:
    """Whether a node is a call of ``l4convert::MoE``."""
    return node.domain == moe.DOMAIN and node.op_type == moe.OP_TYPE


def weight_inputs(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of a node are weights [..,K,N] that it multiplies with."""
    if is_moe(node):
        return (moe.Inputs._fields.index("gate_up"), moe.Inputs._fields.index("down"))
    return (1,) if node.op_type == "MatMul" and node.domain == "" else ()


class _Quantizer:
    def __init__(self, model: ir.Model, recipe: Recipe, outcome: Outcome) -> None:
        self.model, self.graph = model, model.graph
        self.recipe = recipe
        self.outcome = outcome
        self.compute = compute_type(model.graph)
        self.dequantized: dict[str, ir.Value] = {}
        self.schemes: dict[ir.Value, Scheme] = {}
        self.rounded: dict[ir.Value, ir.Value] = {}
        self.seen: set[str] = set()
        self.noted: set[str] = set()

    def visit(self, node: ir.Node, index: int) -> None:
        weight = float_weight(node.inputs[index])
        if weight is None or weight.tensor.dtype not in FLOATS:
            return
        self.seen.add(weight.name)
        scheme = self.recipe.scheme_for(weight.name)
        if weight.name not in self.noted and (remark := carry_over_remark(weight, scheme)) is not None:
            self.noted.add(weight.name)
            self.outcome.note(weight.name, remark)
        if scheme.kind == "none":
            self.outcome.skip(weight.name, "the recipe keeps it")
            return
        if weight.name not in self.dequantized:
            b = Builder(weight.name)
            value = dequantize(b, self.graph, weight, scheme)
            self.graph.insert_before(node, b.nodes)
            self.dequantized[weight.name], self.schemes[value] = value, scheme
            self.outcome.fired += 1
        node.replace_input_with(index, self.dequantized[weight.name])
        if scheme.activations and not is_moe(node):
            self.round_input(node, weight.tensor.dims[-2])

    def round_input(self, node: ir.Node, width: int) -> None:
        source = node.inputs[0]
        assert source is not None  # MatMul's first input is not optional
        if source not in self.rounded:
            b = Builder(f"{source.name}/rounded")
            self.rounded[source] = round_per_token(b, source, width, self.compute)
            self.graph.insert_before(node, b.nodes)
        node.replace_input_with(0, self.rounded[source])

    def round_expert_inputs(self, node: ir.Node) -> None:
        """Inside the experts the activations are the function's business: call the variant that rounds them."""
        schemes = [self.schemes.get(node.inputs[i]) for i in weight_inputs(node)]  # type: ignore[arg-type]
        wanted = [s is not None and s.activations for s in schemes]
        if not any(wanted):
            return
        if not all(wanted):
            self.outcome.skip(node.name, "activations stay float: only one of gate_up and down has dynamic activations")
            return
        spec = dataclasses.replace(spec_of(MoESpec, node), activations="fp8")
        node.overload = fuse_experts.declare(self.model, spec)
        node.attributes["activations"] = ir.AttrString("activations", "fp8")

    def skip_rest(self) -> None:
        """Weights that the recipe names but that no matrix product uses (an embedding table, say)."""
        for name, value in self.graph.initializers.items():
            if name in self.seen or name in self.dequantized or not isinstance(value.const_value, LazyTensor):
                continue
            if all(node.op_type == "DequantizeLinear" for node, _ in value.uses()):
                continue  # the scales of a quantized weight, whose name the recipe may match as well; or unused
            if value.dtype in FLOATS and self.recipe.scheme_for(name).kind != "none":
                self.outcome.skip(name, "no matrix product takes it as its second operand")


def dequantize(b: Builder, graph: ir.Graph, weight: Weight, scheme: Scheme) -> ir.Value:
    """Append the ``DequantizeLinear`` of a weight [..,K,N] under a scheme; its tensors stay lazy.

    Scales are stored in the type that the weight is computed with, which is what ``DequantizeLinear`` gives.

    INT4 has blocks along K. FP8 has one scale for each column: a scale vector for a matrix, one block as long as K for
    stacked experts, which ONNX cannot say otherwise.
    """
    name, (*lead, depth, width) = weight.name, weight.tensor.dims
    axis = len(lead)
    values, scales = quantized(transposed(weight.tensor), scheme)
    if scheme.kind == "int4":
        attributes = {"axis": axis, "block_size": scheme.block_size_for(depth)}
        scales = transposed(scales)
    elif not lead:
        attributes, scales = {"axis": 1}, Reshaped(scales, [width])
    else:
        attributes, scales = {"axis": axis, "block_size": depth}, transposed(scales)
    values.name = scales.name = None
    scales = cast(scales, weight.dtype)
    stored = add_initializer(graph, f"{name}_{scheme.kind}", transposed(values))
    scale = add_initializer(graph, f"{name}_scale", scales)
    return b.op("DequantizeLinear", stored, scale, name="dequantized", **attributes)


def quantized(k_last: LazyTensor, scheme: Scheme) -> tuple[LazyTensor, LazyTensor]:
    """Values and scales of a weight [..,N,K] under a scheme; a resolved one takes those of the checkpoint."""
    found = take_over(k_last, scheme) if scheme.scale == STORED else None
    if found is not None:
        return found
    if scheme.kind == "fp8":
        return quantize_fp8(k_last)
    rule = "lse" if scheme.scale == STORED else scheme.scale
    return quantize_int4(k_last, scheme.block_size_for(k_last.dims[-1]), rule)


def carry_over_remark(weight: Weight, scheme: Scheme) -> str | None:
    """What became of a weight that the checkpoint stores quantized; None: it does not."""
    kinds = stored_kinds(weight.tensor)
    if not kinds:
        return None
    if scheme.kind == "none":
        return f"stored as {kinds}, kept dequantized"
    if scheme.scale == STORED and take_over(transposed(weight.tensor), scheme) is not None:
        inputs = "; inputs are rounded to FP8, too, token by token" if scheme.activations else ""
        return f"carried over: the checkpoint's own codes and scales ({kinds}){inputs}"
    kept = stored_scheme(Scheme("keep"), transposed(weight.tensor), weight.name)
    hint = "; --recipe keep would carry its codes over" if kept is not None else ""
    return f"stored as {kinds}, rounded a second time, to {scheme.kind}{hint}"
