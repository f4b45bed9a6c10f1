"""The packed layouts, against ONNX Runtime's own kernels. Scales of both signs, as the "lse" rule gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import helper

from l4convert.checkpoint.combiners import InterleavedHalves
from l4convert.checkpoint.lazy import Constant, LazyTensor
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from l4convert.quantization.int4 import quantize_int4
from l4convert.quantization.layouts import (
    long_words,
    matmul_nbits,
    ordered_words,
    pack,
    qmoe,
    unpack,
    unpack_matmul_nbits,
    words,
)

INT4_VALUES = st.integers(-8, 7)


def int4(values: np.ndarray) -> LazyTensor:
    return Constant(values.astype(ml_dtypes.int4))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run(
    node: onnx.NodeProto, feeds: Mapping[str, np.ndarray], initializers: Mapping[str, LazyTensor | np.ndarray]
) -> np.ndarray:
    import onnxruntime as ort

    tensors = []
    for name, value in initializers.items():
        tensor = value if isinstance(value, LazyTensor) else Constant(value)
        tensor.name = name
        tensors.append(ir.to_proto(tensor))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one_node", inputs, [output], tensors)
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, dict(feeds))[0]
    return result


def dequantized(values: LazyTensor, scales: LazyTensor, block_size: int) -> np.ndarray:
    steps = np.repeat(scales.numpy(), block_size, axis=-1)[..., : values.dims[-1]]
    product: np.ndarray = values.numpy().astype(np.float32) * steps
    return product


@settings(max_examples=50)
@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=INT4_VALUES))
def test_pack_round_trip(values: np.ndarray) -> None:
    values = np.concatenate([values, values], axis=-1)  # an even number
    packed = pack(values)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed), values)


@settings(max_examples=50)
@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=140), elements=INT4_VALUES), st.data())
def test_matmul_nbits_round_trip(values: np.ndarray, data: st.DataObject) -> None:
    block_size = data.draw(st.sampled_from([32, 64, 128]))
    rows, cols = values.shape
    packed = matmul_nbits(int4(values), block_size)
    array = packed.numpy()
    assert array.shape == packed.dims == (rows, -(-cols // block_size), block_size // 2)
    np.testing.assert_array_equal(unpack_matmul_nbits(array, cols), values)
    filler = unpack(array).reshape(rows, -1)[:, cols:]
    assert not filler.any()
    begin = data.draw(st.integers(0, packed.matrix[2] - 1))
    end = data.draw(st.integers(begin + 1, packed.matrix[2]))
    tile = packed.tile(0, slice(rows // 2, rows), slice(begin, end))
    np.testing.assert_array_equal(tile, array.reshape(rows, -1)[rows // 2 :, begin:end])


@settings(max_examples=30)
@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9), elements=INT4_VALUES))
def test_qmoe_round_trip(values: np.ndarray) -> None:
    values = np.concatenate([values, values], axis=-1)
    packed = qmoe(int4(values))
    assert packed.dims == (*values.shape[:2], values.shape[2] // 2)
    np.testing.assert_array_equal(unpack(packed.numpy()), values)


def test_first_value_is_in_the_low_nibble_around_eight() -> None:
    np.testing.assert_array_equal(pack(np.array([-8, 7, 0, 1], np.int8)), [0xF0, 0x98])


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="expected INT4 with 2 axes"):
        matmul_nbits(Constant(random(2, 32)), 32)
    with pytest.raises(ValueError, match="expected INT4 with 3 axes"):
        qmoe(int4(np.zeros((2, 32))))
    with pytest.raises(ValueError, match="K must be even"):
        qmoe(int4(np.zeros((1, 2, 33))))


@pytest.mark.parametrize(
    ("rows", "cols", "block_size"), [(7, 64, 32), (6, 48, 32), (5, 33, 32), (32, 256, 128), (9, 96, 64)]
)
@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_matmul_nbits_kernel(rows: int, cols: int, block_size: int, accuracy_level: int) -> None:
    values, scales = quantize_int4(Constant(random(rows, cols)), block_size, "lse")
    assert (scales.numpy() < 0).any()
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=4,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )
    x = random(3, cols)
    got = run(node, {"x": x}, {"w": matmul_nbits(values, block_size), "s": scales})
    expected = x @ dequantized(values, scales, block_size).T
    # accuracy level 4 lets the kernel round x to 8 bits
    assert np.abs(got - expected).max() <= (1e-5 if accuracy_level == 0 else 2e-2) * np.abs(expected).max()


@pytest.mark.parametrize("block_size", [32, 64])
def test_qmoe_kernel(block_size: int) -> None:
    experts, hidden, width, tokens = 4, 64, 128, 5
    gate_up = quantize_int4(Constant(random(experts, 2 * width, hidden) * 0.1), block_size, "lse")
    down = quantize_int4(Constant(random(experts, hidden, width) * 0.1), block_size, "lse")
    assert (gate_up[1].numpy() < 0).any()
    x, logits = random(tokens, hidden), random(tokens, experts)
    node = helper.make_node(
        "QMoE",
        ["x", "r", "w1", "s1", "", "w2", "s2"],
        ["y"],
        domain="com.microsoft",
        k=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        block_size=block_size,
        expert_weight_bits=4,
        normalize_routing_weights=1,
    )
    initializers = {
        "w1": qmoe(InterleavedHalves(gate_up[0])),
        "s1": InterleavedHalves(gate_up[1]),
        "w2": qmoe(down[0]),
        "s2": down[1],
    }
    got = run(node, {"x": x, "r": logits}, initializers)
    gates, downs = dequantized(*gate_up, block_size), dequantized(*down, block_size)
    expected = np.stack([_expert(x[t], gates[e], downs[e]) for t, e in enumerate(logits.argmax(1))])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def _expert(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> Any:
    gate, up = np.split(gate_up @ x, 2)
    return down @ (gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("shape", [(6, 64), (6, 48), (3, 4, 96)])
def test_dequantize_linear_agrees(shape: tuple[int, ...]) -> None:
    values, scales = quantize_int4(Constant(random(*shape)), 32, "lse")
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["y"], axis=-1, block_size=32)
    got = run(node, {"s": scales.numpy()}, {"q": values})
    np.testing.assert_array_equal(got, dequantized(values, scales, 32))


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.float8_e4m3fn])
def test_words_are_the_stored_bytes(dtype: Any) -> None:
    """As onnx stores the values: four or eight of them are one little-endian word."""
    values = random(3, 5, 16).astype(dtype)
    tensor = words(Constant(values))
    stored = ir.Tensor(values, dtype=ir.DataType.from_numpy(values.dtype)).tobytes()
    codes = 8 if dtype is ml_dtypes.int4 else 4
    assert (tensor.dtype, tensor.shape) == (ir.DataType.INT32, (3, 5, 16 // codes))
    assert tensor.tobytes() == stored
    expected = np.frombuffer(stored, "<i4").reshape(tensor.shape)
    assert np.array_equal(tensor.numpy(), expected)
    assert np.array_equal(tensor.tile(2, slice(1, 4), slice(1, 2)), expected[2, 1:4, 1:2])


@pytest.mark.parametrize(("dtype", "width"), [(ml_dtypes.int4, 12), (ml_dtypes.float8_e4m3fn, 6)])
def test_words_need_whole_rows(dtype: Any, width: int) -> None:
    with pytest.raises(ValueError, match="rows are not a whole number of words"):
        words(Constant(np.zeros((2, 4, width), dtype)))


ORDERS = {
    "plugin": (GROUP, K_ORDER),
    "pairs apart": (16, (2, 8, 3, 9, 0, 10, 1, 11, 4, 12, 5, 13, 6, 14, 7, 15)),
    "nibbles": (8, (0, 2, 4, 6, 1, 3, 5, 7)),
    "backwards": (64, tuple(range(63, -1, -1))),
}


@pytest.mark.parametrize("order", list(ORDERS))
def test_codes_of_ordered_words_are_where_the_order_says(order: str) -> None:
    group, places = ORDERS[order]
    values = np.random.default_rng(1).integers(-8, 8, (2, 5, 192))
    stored = ordered_words(int4(values), group, places)
    array = stored.numpy()
    assert (array.dtype, array.shape) == (np.int32, stored.dims) == (np.int32, (2, 5, 24))
    for column in range(192):
        start, slot = column // group * group, column % group
        bits = (array[..., column // 8] >> (4 * (column % 8))) & 0xF
        np.testing.assert_array_equal((bits ^ 8) - 8, values[..., start + places[slot]])
    part = stored.tile(1, slice(1, 4), slice(3, 21))  # neither end is that of a group
    np.testing.assert_array_equal(part, array[1, 1:4, 3:21])


@pytest.mark.parametrize("by_columns", [False, True])
def test_long_words_are_the_bytes_of_the_codes(by_columns: bool) -> None:
    codes = np.random.default_rng(2).integers(0, 256, (2, 3, 520), np.uint8).view(ml_dtypes.float8_e4m3fn)
    source = Constant(np.asfortranarray(codes[0])[np.newaxis] if by_columns else codes)
    stored = long_words(source)
    assert stored.dims == (*source.dims[:2], 65)
    assert stored.tobytes() == source.tobytes()
    np.testing.assert_array_equal(stored.tile(0, slice(1, 3), slice(2, 9)), stored.numpy()[0, 1:3, 2:9])


def test_what_does_not_fill_words_is_refused() -> None:
    with pytest.raises(ValueError, match="K is not a multiple of 64"):
        ordered_words(int4(np.zeros((1, 64, 96))), GROUP, K_ORDER)
    with pytest.raises(ValueError, match="K a multiple of 8"):
        long_words(Constant(np.zeros((1, 4, 12), ml_dtypes.float8_e4m3fn)))
