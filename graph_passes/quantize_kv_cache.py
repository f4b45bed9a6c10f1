"""Quantize key/value caches: ``LongContextAttention`` takes and gives codes, and two scales more.

The recipe's ``kv_cache`` says which layers, and how elements are stored. The scales come from calibration, which runs
the graph; until :func:`set_kv_scales` they are ones. They stay in model.onnx, so that they can be set when the weights
are already written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import INLINE, Builder
from l4convert.frontend.compute import record_compute_type
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_function, attention_calls, attributes_of, clean_up, replace_node
from l4convert.graph_passes.outline_attention import make_pattern
from l4convert.plugins.long_context_attention import definition
from l4convert.plugins.long_context_attention.definition import AttentionSpec, Inputs
from l4convert.quantization.kv import KV_FORMATS, KvScheme
from l4convert.quantization.recipe import Recipe

_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)")
_SCALE = re.compile(r"model\.layers\.(\d+)\.self_attn\.(key|value)_scale")


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Rewrite the calls of the layers that the recipe covers, and the graph's inputs and outputs with them."""
    outcome = Outcome()
    if recipe.kv_cache is None:
        return outcome
    for node, spec, inputs in attention_calls(model.graph):
        if spec.kv_dtype != "none":
            continue
        if reason := _refusal(recipe.kv_cache, spec, inputs):
            outcome.skip(node.name, reason)
            continue
        record_compute_type(model.graph)
        _quantize(model, node, dataclasses.replace(spec, kv_dtype=recipe.kv_cache.dtype), inputs)
        outcome.fired += 1
    clean_up(model)
    return outcome


def _refusal(scheme: KvScheme, spec: AttentionSpec, inputs: Inputs) -> str | None:
    if not scheme.covers(bool(spec.chunk_size)):
        return "the recipe keeps the caches of chunked layers"
    if spec.head_dim % scheme.format.packing:
        return f"heads of {spec.head_dim} are not whole bytes of {scheme.format.packing} codes"
    if any(_graph_input(past) is None for past in (inputs.past_key, inputs.past_value)):
        return "its cache is not an input of the graph"
    return None


def _quantize(model: ir.Model, node: ir.Node, spec: AttentionSpec, inputs: Inputs) -> None:
    prefix = f"model.layers.{_layer(inputs.past_key)}.self_attn"
    changed = inputs._replace(
        past_key=_retype_past(inputs.past_key, spec),
        past_value=_retype_past(inputs.past_value, spec),
        key_scale=_add_scale(model.graph, spec, f"{prefix}.key_scale"),
        value_scale=_add_scale(model.graph, spec, f"{prefix}.value_scale"),
    )
    pattern = make_pattern(spec)
    parameters = [value for value in pattern.inputs if value is not None]
    body, results = pattern.body, pattern.outputs
    b = Builder()
    outputs = b.node(
        definition.OP_TYPE,
        [value for value in changed if value is not None],
        outputs=3,
        name=node.name,
        domain=definition.DOMAIN,
        overload=add_function(model, definition.DOMAIN, definition.OP_TYPE, spec, parameters, body, results),
        **attributes_of(spec),
    )
    replace_node(model.graph, node, b, outputs)
    for present in outputs[1:]:
        _retype(present, spec)


def _graph_input(past: ir.Value) -> ir.Value | None:
    """The input that a cache comes from: itself, or through the Reshape that a growing cache has in front."""
    node = past.producer()
    source = past if node is None else node.inputs[0] if node.op_type == "Reshape" else None
    return source if source is not None and source.is_graph_input() and _PAST.fullmatch(source.name or "") else None


def _layer(past: ir.Value) -> int:
    source = _graph_input(past)
    match = _PAST.fullmatch(source.name or "") if source is not None else None
    assert match is not None  # the pass refuses other caches
    return int(match[1])


def _retype_past(past: ir.Value, spec: AttentionSpec) -> ir.Value:
    """Give the graph's input the stored type; a Reshape after it the width of a head in stored elements."""
    source = _graph_input(past)
    assert source is not None  # as above
    _retype(source, spec)
    node = past.producer()
    if node is None or node.graph is None:
        return past
    b = Builder(node.name or "past")
    heads = b.reshape(source, [0, spec.kv_num_heads, -1, _width(spec)])
    node.graph.insert_before(node, b.nodes)
    return heads


def _retype(value: ir.Value, spec: AttentionSpec) -> None:
    """Declare a cache that is an input or output of the graph as stored elements."""
    assert spec.kv_dtype != "none"
    value.type = ir.TensorType(KV_FORMATS[spec.kv_dtype].storage)
    if value.shape is not None and isinstance(value.shape[3], int):
        value.shape = ir.Shape([*value.shape[:3], _width(spec)])


def _width(spec: AttentionSpec) -> int:
    assert spec.kv_dtype != "none"
    return spec.head_dim // KV_FORMATS[spec.kv_dtype].packing


def _add_scale(graph: ir.Graph, spec: AttentionSpec, name: str) -> ir.Value:
    tensor = ir.tensor(np.ones((1, spec.kv_num_heads, 1, spec.head_dim), np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)  # type: ignore[arg-type]
    value.meta[INLINE] = True
    graph.initializers[name] = value
    return value


def kv_scale_names(model: ir.Model) -> list[str]:
    """The scales of a model's quantized caches, in the order of layers; empty where no cache is quantized."""
    matches = [match for name in model.graph.initializers if (match := _SCALE.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[2]))]


def set_kv_scales(model: ir.Model, scales: Mapping[str, np.ndarray]) -> None:
    """Replace the scales of a model's quantized caches, before or after it was lowered.

    Args:
        model: Changed in place.
        scales: Name of the initializer (``model.layers.{i}.self_attn.key_scale``) -> float32 [1,Hk,1,D], positive.

    Raises:
        ValueError: A scale is missing, unknown, or not of this kind; nothing was changed then.
    """
    names = kv_scale_names(model)
    for problem, wrong in (("missing", set(names) - scales.keys()), ("unknown", scales.keys() - set(names))):
        if wrong:
            raise ValueError(f"scales of quantized caches: {min(wrong)} is {problem}")
    checked = {}
    for name in names:
        scale, shape = np.asarray(scales[name]), tuple(model.graph.initializers[name].shape or ())
        if scale.dtype != np.float32 or scale.shape != shape:
            raise ValueError(f"{name} is {scale.dtype} {list(scale.shape)}, expected float32 {list(shape)}")
        # The reciprocal must be a number too: codes are made with it.
        if not (np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)).all():
            raise ValueError(f"{name} has an element that is not a positive normal number")
        checked[name] = ir.tensor(scale, name=name)
    for name, tensor in checked.items():
        model.graph.initializers[name].const_value = tensor
