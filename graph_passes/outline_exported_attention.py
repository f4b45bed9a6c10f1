"""Outline exported attention: products, mask and softmax become a call of ``l4convert::LongContextAttention``.

Exporters write attention as plain nodes: keys and values repeated for every head of their group, scores, an added mask,
a softmax. From opset 23 on the last three may be one ``Attention``. The call needs none of that, and no kernel for it
holds scores of all pairs. Rotation, norms and temperature stay nodes in front of the call, so caches hold what they
held before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import compute_type, from_float32
from l4convert.graph_passes.attention_masks import MaskForm, understand
from l4convert.graph_passes.base import Outcome
from l4convert.graph_passes.editing import add_function, attributes_of, clean_up, replace_outputs
from l4convert.graph_passes.exported_attention import Found, match_attention
from l4convert.graph_passes.matching import Mismatch
from l4convert.graph_passes.outline_attention import make_pattern
from l4convert.plugins.long_context_attention import definition
from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.quantization.recipe import Recipe

# More tokens than any cache holds; times a chunk it still is an int64.
_FAR = 1 << 40


def run(model: ir.Model, recipe: Recipe) -> Outcome:
    """Try every ``Softmax`` and ``Attention``."""
    outcome = Outcome()
    forms: dict[ir.Value, MaskForm] = {}
    positions: dict[int, tuple[MaskForm, ir.Value]] = {}
    for node in [n for n in model.graph if n.op_type in ("Softmax", "Attention") and n.domain in ("", "ai.onnx")]:
        try:
            found = match_attention(node)
            if found.mask not in forms:
                forms[found.mask] = understand(found.mask, found.key.past is not None)
            form = forms[found.mask]
            _outline(model, node, found, form, positions)
        except Mismatch as reason:
            outcome.skip(node.name, str(reason))
            continue
        outcome.fired += 1
    clean_up(model)
    return outcome


def _outline(
    model: ir.Model, node: ir.Node, found: Found, form: MaskForm, known: dict[int, tuple[MaskForm, ir.Value]]
) -> None:
    """Replace an attention by a call; what follows from the mask is computed once for all layers of a kind."""
    graph, compute = model.graph, compute_type(model.graph)
    key = found.key
    b = Builder(f"{(node.name or 'attention').rpartition('/')[0]}/{node.outputs[0].name}/attention")
    if form.chunk_size not in known:
        known[form.chunk_size] = form, _positions(b, form, found)
    if known[form.chunk_size][0] is not form:
        raise Mismatch("other layers with chunks of this size have another mask")
    spec = AttentionSpec(
        num_heads=key.heads,
        kv_num_heads=key.kv_heads,
        head_dim=key.width,
        chunk_size=form.chunk_size,
        rope=False,
        qk_norm_eps=0.0,
        floor_scale=1.0,
        attn_scale=0.0,
        kv_cache="growing",
        compute=compute,
    )
    flat = [
        b.reshape(x, [0, 0, heads * key.width])
        for x, heads in ((found.query, key.heads), (key.new, key.kv_heads), (found.value.new, key.kv_heads))
    ]
    pasts = [side.past if side.past is not None else _no_past(b, found.query, spec) for side in (key, found.value)]
    pattern = make_pattern(spec)
    arguments = [x for x in pattern.inputs if x is not None]
    overload = add_function(
        model, definition.DOMAIN, definition.OP_TYPE, spec, arguments, pattern.body, pattern.outputs
    )
    outputs = b.node(
        definition.OP_TYPE,
        [*flat, *pasts, known[form.chunk_size][1]],
        outputs=3,
        name="call",
        domain=definition.DOMAIN,
        overload=overload,
        **attributes_of(spec),
    )
    graph.extend(b.nodes)  # clean_up orders the nodes
    replace_outputs([found.merged], outputs[:1])
    for side, present in ((key, outputs[1]), (found.value, outputs[2])):
        if side.present is not None:
            replace_outputs([side.present], [present])


def _no_past(b: Builder, query: ir.Value, spec: AttentionSpec) -> ir.Value:
    """A cache [B,Hk,0,D] of no tokens."""
    shape = b.op("Concat", b.dim(query, 0), b.constant([spec.kv_num_heads, 0, spec.head_dim]), axis=0)
    return from_float32(b, b.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32))), spec.compute)


def _positions(b: Builder, form: MaskForm, found: Found) -> ir.Value:
    """The place of every token, int64 [B,P+S], in its row or from its row's first token on.

    Padding in front of all tokens and behind them is -1. Padding in between, and in front where places count from the
    row's beginning, is far behind all tokens, where none sees it, and not at its own place, so that no kernel takes the
    row for one without padding (lower_attention_to_gqa).
    """
    new = b.dim(found.query, 1)
    total = new if found.key.past is None else b.op("Add", new, b.dim(found.key.past, 2))
    batch = b.dim(found.query, 0)
    place = b.op("Range", b.constant(0), b.op("Squeeze", total), b.constant(1))
    if form.mask is None:
        return b.op("Expand", b.op("Unsqueeze", place, b.constant([0])), b.op("Concat", batch, total, axis=0))
    mask = b.slice(b.slice(form.mask, b.constant([0]), batch, axis=0), b.constant([0]), total, axis=1)
    real = b.op("Cast", mask, to=int(ir.DataType.BOOL))
    ones = b.op("Cast", real, to=int(ir.DataType.INT64))
    seen = b.op("CumSum", ones, b.constant(1))
    # Or a token; nothing behind the last one.
    padding = b.op("Less", seen, b.op("ReduceSum", ones, b.constant([1]), keepdims=1))
    counted = place
    if form.from_first_token or not form.chunk_size:
        before = b.op("Equal", seen, b.constant(0))
        padding = b.op("And", padding, b.op("Not", before))
        first = b.op("ReduceSum", b.op("Cast", before, to=int(ir.DataType.INT64)), b.constant([1]), keepdims=1)
        counted = b.op("Sub", place, first)
    far = b.op("Add", place, b.constant(1 + (form.chunk_size or 1) * _FAR))
    return b.op("Where", real, counted, b.op("Where", padding, far, b.constant(-1)))
