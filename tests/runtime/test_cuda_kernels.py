"""The CPU stand-ins of CUDA's kernels compute what those kernels are documented to compute."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from l4convert.frontend.builder import Builder
from l4convert.runtime.cuda_kernels import has_cuda_kernels, replace_cuda_kernels

RNG = np.random.default_rng(0)
B, S, HEADS, KV_HEADS, D, ROWS = 2, 3, 4, 2, 16, 8


def value(name, array):
    return ir.Value(
        name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(list(array.shape))
    )


def run(op_type, feeds, outputs, dtype, **attributes):
    """One contrib op on these inputs, in a branch of an ``If``, through its stand-in."""
    values = [value(name, array) for name, array in feeds.items()]
    by_name = {v.name: v for v in values}
    inside = Builder("inside")
    results = inside.node(op_type, [by_name.get(n) for n in attributes.pop("order")], outputs=outputs,
                          domain="com.microsoft", **attributes)  # fmt: skip
    branches = {"then_branch": ir.Graph([], results, nodes=inside.nodes, name="then")}
    other = Builder("other")
    empty = [other.constant(np.zeros((), dtype), dtype) for _ in results]
    branches["else_branch"] = ir.Graph([], empty, nodes=other.nodes, name="else")
    b = Builder()
    chosen = b.node("If", [b.constant(True, np.bool_)], outputs=outputs, **branches)
    for out in chosen:
        out.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    opsets = {"": 23, "com.microsoft": 1}
    model = ir.Model(ir.Graph(values, chosen, nodes=b.nodes, opset_imports=opsets, name="g"), ir_version=11)
    assert has_cuda_kernels(model)
    replace_cuda_kernels(model)
    assert not has_cuda_kernels(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    kept = {i.name for i in session.get_inputs()}
    typed = {n: _ort_value(a) for n, a in feeds.items() if n in kept}
    return [x.numpy() for x in session.run_with_ort_values([o.name for o in session.get_outputs()], typed)]


def _ort_value(array):
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), int(ir.DataType.FLOAT8E4M3FN))
    return ort.OrtValue.ortvalue_from_numpy(array)


def test_a_norm_with_weights_comes_before_the_rotation():
    """By the op's text: per-head RMS norm, then interleaved rotation by the slot's number, then causal attention."""
    feeds = {
        "q": RNG.standard_normal((B, S, HEADS * D)), "k": RNG.standard_normal((B, S, KV_HEADS * D)),
        "v": RNG.standard_normal((B, S, KV_HEADS * D)), "pk": np.zeros((B, KV_HEADS, ROWS, D)),
        "pv": np.zeros((B, KV_HEADS, ROWS, D)), "cos": np.cos(np.arange(ROWS)[:, None] * np.ones(D // 2)),
        "sin": np.sin(np.arange(ROWS)[:, None] * np.ones(D // 2)),
        "qw": 1 + 0.5 * RNG.standard_normal(D), "kw": 1 + 0.5 * RNG.standard_normal(D),
    }  # fmt: skip
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    feeds |= {"last": np.full(B, S - 1, np.int32), "total": np.array(S, np.int32)}
    order = ["q", "k", "v", "pk", "pv", "last", "total", "cos", "sin", *[None] * 5, "qw", "kw"]
    out, key, _ = run("GroupQueryAttention", feeds, 3, np.float32, order=order, num_heads=HEADS,
                      kv_num_heads=KV_HEADS, do_rotary=1, rotary_interleaved=1, qk_norm_epsilon=0.01)  # fmt: skip
    query = _rotated(_normed(feeds["q"].reshape(B, S, HEADS, D), feeds["qw"]))
    keys = _rotated(_normed(feeds["k"].reshape(B, S, KV_HEADS, D), feeds["kw"]))
    np.testing.assert_allclose(key[:, :, :S], keys.transpose(0, 2, 1, 3), atol=1e-5)
    keys, values = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (keys, feeds["v"].reshape(B, S, KV_HEADS, D)))
    scores = np.einsum("bqhd,bkhd->bhqk", query, keys) / np.sqrt(D)
    scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, values).reshape(B, S, -1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def _normed(heads, weight):
    return heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + 0.01) * weight


def _rotated(heads):
    pairs = heads.reshape(*heads.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.arange(S))[:, None, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(heads.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_8_bit_float_weight_has_one_scale_a_column(dtype):
    a = RNG.standard_normal((2, 5, 32)).astype(dtype)
    weight = RNG.standard_normal((8, 32)).astype(ml_dtypes.float8_e4m3fn)
    scale = RNG.random((8, 1)).astype(np.float32)
    feeds = {"a": a, "w": weight, "s": scale}
    (out,) = run("MatMulBlockQuantizedFp8Weight", feeds, 1, dtype, order=["a", "w", "s"], block_size=32)
    expected = a.astype(np.float64) @ (weight.astype(np.float64) * scale).T
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 if dtype == np.float32 else 4e-2)
