"""Stored elements of caches: against torch's and ml_dtypes' rounding, and ONNX Runtime's own kernel."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from l4convert.quantization.kv import KV_FORMATS
from l4convert.quantization.kv_codes import INT4_ZERO, dequantize_kv, quantize_kv

RNG = np.random.default_rng(3)
SCALE = RNG.uniform(0.01, 0.1, (1, 2, 1, 16)).astype(np.float32)
# Some saturate in every format, and many lie between two INT4 codes, or exactly in the middle.
VALUES = (RNG.integers(-40, 41, (1, 2, 500, 16)) / 2).astype(np.float32) * SCALE


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=1, max_dims=4)))
def test_every_byte_of_int4_codes_is_read_and_written_back(stored):
    codes = dequantize_kv(stored, np.ones(1, np.float32), "int4")
    assert (codes.min(initial=0), codes.max(initial=0)) >= (-8, 0)
    assert np.array_equal(quantize_kv(codes, np.ones(1, np.float32), "int4"), stored)


@given(arrays.arrays(np.int8, arrays.array_shapes(min_dims=1, max_dims=4)), st.floats(2**-60, 2**60, width=32))
def test_numbers_of_int8_codes_have_these_codes(stored, scale):
    assert np.array_equal(
        quantize_kv(dequantize_kv(stored, np.float32(scale), "int8"), np.float32(scale), "int8"), stored
    )


def test_zero_is_what_the_zero_byte_says():
    zeros = np.zeros((2, 4), np.float32)
    assert (quantize_kv(zeros, np.ones(1, np.float32), "int4") == INT4_ZERO).all()
    assert not dequantize_kv(np.full((2, 2), INT4_ZERO, np.uint8), np.ones(1, np.float32), "int4").any()


def test_fp8_is_rounded_and_saturated_as_torch_does():
    values = np.concatenate([np.linspace(-600, 600, 4001), 2.0 ** np.arange(-12, 9) * 1.0625]).astype(np.float32)
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    stored = quantize_kv(values, np.ones(1, np.float32), "fp8")
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    assert np.array_equal(stored.astype(np.float32), expected)


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
def test_codes_are_those_of_onnx_runtimes_kernel(dtype, bits):
    """Bit for bit, halves and numbers out of range among them."""
    tokens = VALUES.transpose(0, 2, 1, 3).reshape(1, 500, 32)
    stored = KV_FORMATS[dtype].storage.numpy()
    empty = np.zeros((1, 2, 0, 16 * bits // 8), stored)
    key = _kernel(bits).run(["present_key"], {
        "query": np.zeros_like(tokens), "key": tokens, "value": tokens, "past_key": empty, "past_value": empty,
        "last": np.array([499], np.int32), "total": np.array(500, np.int32), "scale": SCALE,
    })[0]  # fmt: skip
    assert np.array_equal(quantize_kv(VALUES, SCALE, dtype), key)


def _kernel(bits: int) -> onnxruntime.InferenceSession:
    cache = TensorProto.INT8 if bits == 8 else TensorProto.UINT8
    inputs = ["query", "key", "value", "past_key", "past_value", "last", "total", *[""] * 5, "scale", "scale"]
    outputs = ["y", "present_key", "present_value"]
    kinds = {"past_key": cache, "past_value": cache, "last": TensorProto.INT32, "total": TensorProto.INT32}
    node = helper.make_node(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft", num_heads=2, kv_num_heads=2,
        k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=bits,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "kernel",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in dict.fromkeys(inputs) if n],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT if n == "y" else cache, None) for n in outputs],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
