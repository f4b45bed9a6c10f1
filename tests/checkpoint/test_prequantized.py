from __future__ import annotations

import pickle
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint.combiners import Cast, Mapped, Member, OnTop, Reshaped, SideBySide, Stacked, Transposed
from l4convert.checkpoint.lazy import Constant, LazyTensor
from l4convert.checkpoint.prequantized import Prequantized, carried, quantized_parts, stored_bytes
from l4convert.errors import InputError

CODES = {"int4": ml_dtypes.int4, "fp8": ml_dtypes.float8_e4m3fn}


def weight(
    seed: int = 0, shape: tuple[int, ...] = (6, 16), block: int = 8, kind: str = "int4", **extra: LazyTensor
) -> Prequantized:
    random = np.random.default_rng(seed)
    values = random.integers(-8, 8, shape).astype(CODES[kind])
    scales = random.uniform(0.01, 1, (*shape[:-1], -(-shape[-1] // block))).astype(ml_dtypes.bfloat16)
    return Prequantized(Constant(values), Constant(scales), block, **extra)


def product(values: LazyTensor, scales: LazyTensor, block: int) -> np.ndarray:
    wide = np.repeat(scales.numpy().astype(np.float64), block, axis=-1)[..., : values.dims[-1]]
    return values.numpy().astype(np.float64) * wide


@pytest.mark.parametrize("block", [4, 5, 16])
def test_a_tile_is_exactly_values_times_scales(block: int) -> None:
    tensor = weight(block=block)
    expected = product(tensor.values, tensor.scales, block)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(tensor.tile(0, slice(1, 4), slice(3, 11)), expected[1:4, 3:11])
    assert tensor.dtype == ir.DataType.FLOAT
    assert stored_bytes(tensor) == 6 * 16 // 2 + 6 * -(-16 // block) * 2


def test_zero_points_are_taken_off_and_groups_looked_up() -> None:
    zero_points = np.arange(12).reshape(6, 2).astype(np.int8)
    groups = np.array([1, 0] * 8, np.int32)
    tensor = weight(zero_points=Constant(zero_points), groups=Constant(groups))
    values, scales = (part.numpy().astype(np.float64) for part in (tensor.values, tensor.scales))
    expected = (values - zero_points[:, groups]) * scales[:, groups]
    np.testing.assert_array_equal(tensor.numpy(), expected)
    np.testing.assert_array_equal(tensor.tile(0, slice(2, 3), slice(5, 9)), expected[2:3, 5:9])
    assert tensor.kind == "INT4 in groups of 8 in activation order with zero points"


def test_plans_with_such_weights_travel_to_other_machines() -> None:
    tensor = weight(groups=Constant(np.array([1, 0] * 8, np.int32)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tensor)).numpy(), tensor.numpy())  # our own


def test_a_group_beyond_the_scales_is_refused() -> None:
    with pytest.raises(InputError, match="beyond the 2"):
        weight(groups=Constant(np.full(16, 2, np.int32))).numpy()


def gate_up(expert: int) -> LazyTensor:
    return SideBySide([Transposed(weight(expert)), Transposed(weight(9 + expert))])


COMBINED: dict[str, Callable[[], LazyTensor]] = {
    "itself": weight,
    "cast": lambda: Cast(weight(), ir.DataType.BFLOAT16),
    "transposed twice": lambda: Transposed(Transposed(weight())),
    "experts": lambda: Transposed(Stacked([gate_up(1), gate_up(2)])),
    "one expert": lambda: Member(Stacked([weight(1), weight(2)]), 1),
    "joined along N": lambda: OnTop([weight(1), weight(2, (4, 16))]),
    "joined along K": lambda: SideBySide([weight(1), weight(2, (6, 24))]),
    "joined along K, transposed": lambda: Transposed(OnTop([Transposed(weight(1)), Transposed(weight(2))])),
    "reshaped": lambda: Reshaped(weight(3, (2, 3, 16)), (2, 1, 3, 16)),
    "one scale a row each, joined along K": lambda: SideBySide([weight(1, block=16), weight(2, block=16)]),
    "fp8": lambda: Transposed(Stacked([Transposed(weight(e, block=16, kind="fp8")) for e in (1, 2)])),
}


@pytest.mark.parametrize("make", COMBINED.values(), ids=COMBINED.keys())
def test_codes_are_found_behind_what_was_combined(make: Callable[[], LazyTensor]) -> None:
    tensor = make()
    found = carried(tensor)
    assert found is not None
    assert found.values.dims == tensor.dims
    assert found.values.dtype in (ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
    whole = tensor.parts[0] if isinstance(tensor, Cast) else tensor  # type: ignore[attr-defined]
    np.testing.assert_array_equal(product(found.values, found.scales, found.block_size), whole.numpy())
    rows, cols = found.values.matrix[1:]
    if found.values.dtype == ir.DataType.INT4:
        tile = found.values.tile(0, slice(1, rows), slice(2, cols)).astype(np.int8)
        nibbles = found.values.packed(0, slice(1, rows), slice(2, cols))
        low, high = nibbles & 0x0F, nibbles >> 4
        np.testing.assert_array_equal(low, tile[:, ::2] & 0x0F)
        np.testing.assert_array_equal(high, tile[:, 1::2] & 0x0F)


NOT_CARRIED: dict[str, Callable[[], LazyTensor]] = {
    "K is not last": lambda: Transposed(weight()),
    "zero points": lambda: weight(zero_points=Constant(np.zeros((6, 2), np.int8))),
    "activation order": lambda: weight(groups=Constant(np.zeros(16, np.int32))),
    "a part that is not quantized": lambda: OnTop([weight(), Constant(np.zeros((6, 16), np.float32))]),
    "different blocks": lambda: OnTop([weight(), weight(block=4)]),
    "different codes": lambda: Stacked([weight(), weight(kind="fp8")]),
    "a block that goes on in the next part": lambda: SideBySide([weight(shape=(6, 12)), weight(shape=(6, 12))]),
    "another shape": lambda: Reshaped(weight(), (3, 32)),
    "computed": lambda: Mapped(weight(), np.negative, ir.DataType.FLOAT),
    "8 bits": lambda: Prequantized(Constant(np.zeros((2, 8), np.int8)), Constant(np.ones((2, 1), np.float32)), 8),
}


@pytest.mark.parametrize("make", NOT_CARRIED.values(), ids=NOT_CARRIED.keys())
def test_what_cannot_be_carried_over_is_not(make: Callable[[], LazyTensor]) -> None:
    assert carried(make()) is None
    assert next(quantized_parts(make())) is not None
