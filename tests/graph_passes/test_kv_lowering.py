"""Quantized caches in the kernels of ONNX Runtime: the same codes and logits as the definition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.graph_passes import lower_attention_to_gqa, verification
from l4convert.graph_passes.base import Pass
from l4convert.graph_passes.verification import Probes, verified
from l4convert.progress import NO_PROGRESS
from l4convert.runtime.ort_values import ort_value
from tests.caches import OUTLINED, CacheClient, quantized, recipe
from tests.graphs import SPLITS, TOKENS, canonical, op_counts, relative_error, run_passes, snapshot, token_ids
from tests.in_place import session_of

FORMS = ("growing", "windowed", "static")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("kv_cache", FORMS)
def test_the_cpu_kernel_computes_what_the_definition_does(scout, dtype, kv_cache):
    model = quantized(scout, dtype, kv_cache, "cpu")
    assert op_counts(model)["GroupQueryAttention"] == op_counts(model)["If"] == 4
    kernel = CacheClient(model, scout, kv_cache)
    plain = CacheClient(quantized(scout, dtype, kv_cache), scout, kv_cache)
    # One sequence runs the kernel, but for the static form's calls across a boundary; a batch both branches.
    for ids, splits in ((token_ids(1), [1] * TOKENS), (token_ids(1), (5, 3, 8, 8, 5)), (token_ids(2), SPLITS[1])):
        expected = plain.logits(ids, splits)
        assert relative_error(kernel.logits(ids, splits), expected) < 1e-3
        for name, codes in plain.codes().items():
            # One code on the edge of another, at the most. Slots of a buffer that hold no token may differ.
            used = slice(0, (TOKENS % 8 if ".3." not in name else TOKENS) if kv_cache == "static" else None)
            assert (codes[:, :, used] != kernel.codes()[name][:, :, used]).sum() <= 1, name


def test_a_batch_with_padding_takes_the_definition(scout):
    ids, mask = token_ids(2), np.ones((2, TOKENS), np.int64)
    mask[0, :5] = mask[1, -9:] = 0
    results = [
        CacheClient(quantized(scout, "int8", "static", target), scout, "static").logits(ids, (17, 12), mask)[mask > 0]
        for target in ("portable", "cpu")
    ]
    assert relative_error(results[1], results[0]) < 1e-3


def test_static_buffers_are_written_in_place(scout):
    """One buffer bound as past and as present; slots that the call does not write keep their bytes."""
    client = CacheClient(quantized(scout, "int4", "static", "cpu"), scout, "static")
    ids = token_ids(1)
    expected = client.logits(ids, (5, 1, 1))
    binding = client.session.io_binding()
    binding.bind_output("logits", "cpu")
    rng, buffers = np.random.default_rng(0), {}
    for name, value in client.empty(1).items():
        noise = rng.integers(0, 256, value.shape()).astype(np.uint8)
        buffers[name] = (noise, ort_value(noise.copy()))
        binding.bind_ortvalue_input(name, buffers[name][1])
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffers[name][1])
    pieces = []
    for begin, end in ((0, 5), (5, 6), (6, 7)):
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids[:, begin:end]))
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_output("logits", "cpu")
        client.session.run_with_iobinding(binding)
        pieces.append(binding.get_outputs()[0].numpy())
    assert relative_error(np.concatenate(pieces, axis=1), expected[:, :7]) < 1e-5
    for name, (noise, value) in buffers.items():
        assert np.array_equal(value.numpy()[:, :, 7:], noise[:, :, 7:]), name
        assert not np.array_equal(value.numpy()[:, :, :7], noise[:, :, :7]), name


def test_fp8_stays_the_definition_on_the_cpu(scout):
    model = canonical(scout, "static")
    run_passes(model, *OUTLINED, recipe=recipe("fp8"))
    before = snapshot(model)
    (report,) = run_passes(model, "lower_attention_to_gqa")
    assert (report.fired, {why for _, why in report.skipped}) == (
        0,
        {"CPU: GroupQueryAttention takes no caches of FP8"},
    )
    assert snapshot(model) == before


def test_cuda_takes_every_format_and_fp8_where_no_slots_are_cut_out(scout):
    for dtype, kv_cache, fired in (("int8", "growing", 4), ("int4", "static", 4), ("fp8", "static", 4)):
        model = canonical(scout, kv_cache, "bfloat16")
        run_passes(model, *OUTLINED, recipe=recipe(dtype))
        (report,) = run_passes(model, "lower_attention_to_cuda_gqa")
        assert (report.fired, report.skipped) == (fired, ())
    model = canonical(scout, "growing", "bfloat16")
    run_passes(model, *OUTLINED, recipe=recipe("fp8"))
    (report,) = run_passes(model, "lower_attention_to_cuda_gqa")
    assert report.fired == 1  # the global layer
    assert {why for _, why in report.skipped} == {"CUDA: no operator cuts the slots of a chunk out of an FP8 cache"}


def test_cuda_kernels_get_heads_that_are_prepared_and_rounded(scout):
    """It norms and rotates nothing here, and finds the numbers of the cache in the first prompt too."""
    model = canonical(scout, "static", "bfloat16")
    run_passes(model, *OUTLINED, "lower_attention_to_cuda_gqa", recipe=recipe("int8"))
    kernels = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.op_type == "GroupQueryAttention"]
    assert len(kernels) == 4
    for node in kernels:
        assert len(node.inputs) == 14  # up to v_scale: no weights of a norm
        assert node.inputs[7] is None  # no rotary table
        assert node.attributes["kv_cache_bit_width"].as_int() == 8
        assert (
            node.attributes["k_quant_type"].as_string() == node.attributes["v_quant_type"].as_string() == "PER_CHANNEL"
        )
        for given in node.inputs[1:3]:
            assert [n.op_type for n in _upstream(given, 3)] == ["Reshape", "Cast", "Mul"]


def _upstream(value, count):
    for _ in range(count):
        node = value.producer()
        yield node
        value = node.inputs[0]


@pytest.mark.parametrize(("dtype", "kv_cache"), [("int8", "growing"), ("int4", "static"), ("fp8", "static")])
def test_cuda_graphs_compute_the_definition_on_a_cpu(scout, dtype, kv_cache):
    """In float32, with the CPU's kernel; FP8 by the other branch. What CUDA's kernel does was not run anywhere."""
    model = quantized(scout, dtype, kv_cache, "cuda")
    client = CacheClient(quantized(scout, dtype, kv_cache), scout, kv_cache)
    ids = token_ids(1)
    expected = client.logits(ids, SPLITS[1])
    client.session = session_of(model)
    assert relative_error(client.logits(ids, SPLITS[1]), expected) < 1e-3


@pytest.mark.parametrize(
    ("target", "kv_cache", "dtype", "layers", "compute"),
    [
        ("cpu", "static", "int4", "global", "float32"),
        ("tensorrt", "static", "fp8", "all", "float16"),
    ],
)
def test_every_pass_is_verified_with_quantized_caches(scout, target, kv_cache, dtype, layers, compute):
    from l4convert.graph_passes import CANONICAL_PASSES
    from l4convert.targets import TARGETS

    model, rules = canonical(scout, kv_cache, compute), recipe(dtype, layers)
    probes = Probes(scout.config, kv_cache, compute, TARGETS[target].calls == "in_place")
    for graph_pass in (*CANONICAL_PASSES, *TARGETS[target].lowering):
        verified(graph_pass, model, rules, probes, NO_PROGRESS)
    scale = model.graph.initializers["model.layers.3.self_attn.key_scale"].const_value
    assert (scale.numpy() == 1).all()  # those for the noise are gone


def test_a_scale_that_a_lowering_gets_wrong_is_found(scout, monkeypatch):
    """Scales of one would hide it: with them a graph's own noise is seen by its codes."""
    original = lower_attention_to_gqa.group_query_attention

    def exchanged(b, spec, heads, inputs, *args):
        inputs = inputs._replace(value_scale=b.op("Mul", inputs.value_scale, b.constant(1.5, np.float32)))
        return original(b, spec, heads, inputs, *args)

    model, rules = canonical(scout, "growing"), recipe("int8")
    run_passes(model, *OUTLINED, recipe=rules)
    monkeypatch.setattr(lower_attention_to_gqa, "group_query_attention", exchanged)
    row = Pass("lower", "does harm", lower_attention_to_gqa.run)
    with pytest.raises(verification.CheckFailed, match=r"pass lower: .* differs by"):
        verified(row, model, rules, Probes(scout.config, "growing"), NO_PROGRESS)
