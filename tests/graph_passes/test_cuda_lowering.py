"""Target cuda: its kernels, run on the CPU in float32 against transformers; and the places where a kernel refuses."""

from __future__ import annotations

import dataclasses
from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES, lower_attention_to_gqa
from l4convert.quantization.recipe import Scheme, load_recipe
from l4convert.runtime.cuda_kernels import has_cuda_kernels, replace_cuda_kernels
from l4convert.targets import TARGETS
from tests.checkpoints import write_random_checkpoint
from tests.graph_passes.rounding import dequantized, everything
from tests.graphs import (
    SPLITS,
    Client,
    canonical,
    lowered,
    op_counts,
    outputs,
    reference_logits,
    relative_error,
    run_passes,
    token_ids,
)

INT4 = everything(Scheme("int4", 32, "absmax"))
NONE = load_recipe("none")


def on_cpu(model):
    """The same graph for the CPU provider."""
    replace_cuda_kernels(model)
    assert not has_cuda_kernels(model)
    return model


def nodes(model, op_type):
    return [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == op_type]


@pytest.mark.parametrize("kv_cache", ["static", "growing"])
@pytest.mark.parametrize("layout", ["scout", "maverick", "top-2"])
def test_it_equals_transformers_in_one_call_in_pieces_and_padded(layouts, layout, kv_cache):
    """Prefill, decode and chunk boundaries (chunks of 8), a batch of two in both, and padding on either side."""
    checkpoint = layouts[layout]
    model = on_cpu(lowered(checkpoint, "cuda", kv_cache, INT4))
    client, ids = Client(model, checkpoint.config, kv_cache), token_ids(2)
    expected = reference_logits(checkpoint.path, ids, dequantized(INT4))
    for splits in (*SPLITS, (1,) * ids.shape[1]):
        assert relative_error(client.logits(ids, splits), expected) <= 1e-4
        assert relative_error(client.logits(ids[:1], splits), expected[:1]) <= 1e-4
    for padded in (np.s_[:5], np.s_[-5:]):
        mask = np.ones_like(ids)
        mask[1, padded] = 0
        columns = mask[1] > 0
        shifted = np.zeros_like(ids)
        shifted[0], shifted[1, columns] = ids[0], ids[1, : columns.sum()]
        actual = client.logits(shifted, (17, 12), mask)
        assert relative_error(actual[0], expected[0]) <= 1e-4
        assert relative_error(actual[1, columns], expected[1, : columns.sum()]) <= 1e-4


@pytest.mark.parametrize("kv_cache", ["static", "growing"])
def test_layers_with_rope_leave_rotation_and_norm_to_the_kernel(scout, kv_cache):
    model = lowered(scout, "cuda", kv_cache)
    kernels = nodes(model, "GroupQueryAttention")
    config = scout.config
    assert [layer.rope for layer in config.layers] == [True, True, True, False]
    for kernel, layer in zip(kernels, config.layers, strict=True):
        assert kernel.attributes.get_int("do_rotary", 0) == kernel.attributes.get_int("rotary_interleaved", 0)
        assert kernel.attributes.get_int("do_rotary", 0) == layer.rope
        assert len(kernel.inputs) == (16 if layer.rope else 7)
        if layer.rope:
            assert kernel.attributes.get_float("qk_norm_epsilon") == pytest.approx(config.rms_norm_eps)
            assert [list(x.shape) for x in kernel.inputs[7:9]] == [
                [config.attention_chunk_size, config.head_dim // 2]
            ] * 2
            assert kernel.inputs[10] is None  # no mask is added to the scores
    # Beside the kernels there is nothing left of either; the definitions in the other branches have their own.
    assert all("/plain/" in n.name for n in nodes(model, "RotaryEmbedding"))
    assert sum("/plain/" not in n.name for n in nodes(model, "RMSNormalization")) == 2 * len(config.layers) + 1


@pytest.mark.parametrize("kv_cache", ["static", "growing"])
def test_the_kernel_is_what_usually_runs(scout, monkeypatch, kv_cache):
    """A wrong scale in the kernel's branch shows in one call, in a continued one, in a batch and token by token."""
    right = Client(on_cpu(lowered(scout, "cuda", kv_cache)), scout.config, kv_cache)
    original = lower_attention_to_gqa.group_query_attention

    def wrong(b, spec, *args):
        return original(b, dataclasses.replace(spec, head_dim=4, qk_norm_eps=0.0), *args)

    monkeypatch.setattr(lower_attention_to_gqa, "group_query_attention", wrong)
    broken = Client(on_cpu(lowered(scout, "cuda", kv_cache)), scout.config, kv_cache)
    one, two = token_ids(1), token_ids(2)
    for ids, splits in ((one[:, :8], [8]), (one, [5, 3, 8, 8, 5]), (two[:, :8], [8]), (two, [1] * 29)):
        differences = np.abs(broken.logits(ids, splits) - right.logits(ids, splits)).max(axis=(0, 2))
        # The first token of a chunk sees itself only, in the chunked layers; then all differ.
        assert (differences[1:] > 1e-4).all()


def test_growing_calls_across_a_boundary_take_the_definition(scout, monkeypatch):
    """In chunked layers, whose kernel has no mask; the global layers' kernels go on."""
    original = lower_attention_to_gqa.group_query_attention

    def wrong(b, spec, *args):
        return original(b, dataclasses.replace(spec, num_heads=spec.num_heads // 2) if spec.rope else spec, *args)

    right = Client(on_cpu(lowered(scout, "cuda", "growing")), scout.config, "growing")
    monkeypatch.setattr(lower_attention_to_gqa, "group_query_attention", wrong)
    broken = Client(on_cpu(lowered(scout, "cuda", "growing")), scout.config, "growing")
    ids = token_ids(1)
    assert relative_error(broken.logits(ids, [29]), right.logits(ids, [29])) == 0
    with pytest.raises(Exception, match="GroupQueryAttention"):
        broken.logits(ids, [8])


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_kernels_get_the_type_that_the_graph_computes_in(scout, compute):
    model = build_decoder(scout.config, scout.tensors, scout.experts, "static", compute)
    for graph_pass in (*CANONICAL_PASSES, *TARGETS["cuda"].lowering):
        graph_pass(model, INT4)
    dtype = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}[compute]
    for op_type in ("QMoE", "MatMulNBits"):
        scales = [x for n in nodes(model, op_type) for x in n.inputs if x is not None and "scale" in (x.name or "")]
        assert scales
        assert {x.dtype for x in scales} == {dtype}
    kernel = nodes(model, "GroupQueryAttention")[0]
    assert kernel.inputs[14].producer().attributes["value"].as_tensor().dtype == dtype
    assert kernel.inputs[14] is kernel.inputs[15]
    assert {n.attributes.get_int("weights_prepacked") for n in nodes(model, "QMoE")} == {0}


def test_a_narrow_router_still_chooses_by_float32_logits():
    """Two experts whose logits round to one bfloat16 number: the kernel must get the float32 choice."""
    logits = np.array([[1.0, 1.0 + 2**-12, 0.5], [1.0 + 2**-12, 1.0, 0.5]], np.float32)
    assert len(set(logits[0, :2].astype(ml_dtypes.bfloat16))) == 1
    table = _router_input(logits)
    assert table.argmax(axis=1).tolist() == [1, 0]
    assert sorted(set(table.ravel())) == [0, 1]


def _router_input(logits):
    import onnxruntime as ort

    from l4convert.frontend.builder import Builder
    from l4convert.graph_passes import lower_moe_to_qmoe
    from l4convert.plugins.moe.definition import Inputs, MoESpec

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([2, 4]))
    given = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 3]))
    b, seen = Builder(), []
    spec = MoESpec(num_experts=3, hidden_size=4, intermediate_size=4, top_k=1, compute="float16")
    lower_moe_to_qmoe._route(b, spec, Inputs(x, given, None, None), lambda _, rows, table: seen.append(table) or rows)
    (table,) = seen
    table.type, table.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([2, 3])
    graph = ir.Graph([x, given], [table], nodes=b.nodes, opset_imports={"": 23}, name="router")
    proto = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros((2, 4), np.float16), "logits": logits})[0]


@pytest.mark.parametrize("rules", [NONE, INT4, everything(Scheme("fp8")), load_recipe("fp8-experts")])
@pytest.mark.parametrize("layout", ["scout", "top-2", "unfused maverick, top-2"])
def test_products_of_experts_equal_the_definition(layouts, layout, rules):
    """Calls of one token, in which other experts have no rows at all, are among those that are compared."""
    checkpoint = layouts[layout]
    model = canonical(checkpoint)
    run_passes(model, *(row.name for row in CANONICAL_PASSES), recipe=rules)
    expected = outputs(model, checkpoint.config, optimize=False)
    layers = sum(layer.moe for layer in checkpoint.config.layers)
    (report,) = run_passes(model, "lower_moe_to_expert_products")
    assert (report.fired, report.skipped) == (layers, ())
    assert not any(key[1] == "MoE" for key in model.functions)
    assert relative_error(outputs(model, checkpoint.config, optimize=False), expected) <= 1e-5


def test_experts_of_sizes_that_qmoe_refuses_get_4_bit_products_of_their_own(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, hidden_size=96))
    model = build_decoder(checkpoint.config, checkpoint.tensors, checkpoint.experts, "static")
    reports = {p.name: p(model, INT4) for p in (*CANONICAL_PASSES, *TARGETS["cuda"].lowering)}
    assert {reason for _, reason in reports["lower_moe_to_cuda_qmoe"].skipped} == {
        "CUDA: QMoE takes sizes that are multiples of 64, not 96 x 64"
    }
    counts = op_counts(model)
    assert (counts.get("QMoE", 0), counts.get("Loop", 0)) == (0, 0)
    assert counts["MatMulNBits"] == 4 * (7 + 2 * checkpoint.config.num_local_experts)
    expected = outputs(lowered(checkpoint, "portable", "static", INT4), checkpoint.config, "static")
    assert relative_error(outputs(on_cpu(model), checkpoint.config, "static"), expected) <= 1e-5


def test_heads_that_the_kernel_refuses_keep_the_definition(tmp_path):
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path, head_dim=20))
    model = build_decoder(checkpoint.config, checkpoint.tensors, checkpoint.experts, "static")
    reports = {p.name: p(model, NONE) for p in (*CANONICAL_PASSES, *TARGETS["cuda"].lowering)}
    assert {reason for _, reason in reports["lower_attention_to_cuda_gqa"].skipped} == {
        "GroupQueryAttention takes heads of a multiple of 8, not of 20"
    }
    assert op_counts(model).get("GroupQueryAttention", 0) == 0


# compute type -> the FP8 kernels, and why there are none
FP8 = {
    "bfloat16": (60, set()),
    "float16": (60, set()),
    "float32": (0, {"the 8-bit float kernel computes in bfloat16 or float16 only"}),
}


@pytest.mark.parametrize("compute", FP8)
def test_fp8_products_become_the_8_bit_float_kernel(scout, compute):
    model = build_decoder(scout.config, scout.tensors, scout.experts, "static", compute)
    rules = load_recipe("fp8")
    reports = {p.name: p(model, rules) for p in (*CANONICAL_PASSES, *TARGETS["cuda"].lowering)}
    skipped = reports["lower_moe_to_cuda_qmoe"].skipped
    assert {why for _, why in skipped} == {"the kernel cannot round activations between its two matrix products"}
    report, counts = reports["lower_matmul_to_fp8_weights"], op_counts(model)
    # A layer has 7 products outside its routed experts, and each of its 4 experts has 2.
    assert (counts.get("MatMulBlockQuantizedFp8Weight", 0), {why for _, why in report.skipped}) == FP8[compute]
    # What ONNX Runtime has no kernel for: results in bfloat16, and (on CUDA) rounding FP8 in blocks.
    scales = [n.inputs[1] for n in nodes(model, "DequantizeLinear")]
    assert all(s.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16} for s in scales)
    assert not any("block_size" in n.attributes for n in nodes(model, "QuantizeLinear"))
    assert Counter(n.domain for n in nodes(model, "MatMulBlockQuantizedFp8Weight")).keys() <= {"com.microsoft"}
