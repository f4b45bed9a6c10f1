from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.combiners import InterleavedHalves, Mapped, Reshaped, SideBySide, Stacked, Transposed, cast
from l4convert.checkpoint.lazy import Constant, LazyTensor, pack_nibbles


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-7, 8, shape).astype(np.float32)


A, B = numbers(6, 5), numbers(6, 3)
CUBE, TALL = numbers(3, 4, 5), numbers(2, 8, 3)
TENSORS: dict[str, tuple[Callable[[], LazyTensor], np.ndarray]] = {
    "constant": (lambda: Constant(CUBE), CUBE),
    "vector": (lambda: Constant(A[0]), A[0]),
    "scalar": (lambda: Constant(np.float32(3)), np.array(3, np.float32)),
    "transposed": (lambda: Transposed(Constant(CUBE)), CUBE.transpose(0, 2, 1)),
    "reshaped": (lambda: Reshaped(Constant(CUBE), [12, 5]), CUBE.reshape(12, 5)),
    "stacked": (lambda: Stacked([Constant(A), Constant(2 * A)]), np.stack([A, 2 * A])),
    "side by side": (lambda: SideBySide([Constant(A), Constant(B), Constant(A)]), np.concatenate([A, B, A], axis=1)),
    "interleaved": (
        lambda: InterleavedHalves(Constant(TALL)),
        np.stack([TALL[:, :4], TALL[:, 4:]], axis=2).reshape(2, 8, 3),
    ),
    "cast": (lambda: cast(Constant(A), ir.DataType.BFLOAT16), A.astype(ml_dtypes.bfloat16)),
    "mapped": (lambda: Mapped(Constant(A), np.abs, ir.DataType.FLOAT), np.abs(A)),
    "int4": (lambda: cast(Constant(CUBE), ir.DataType.INT4), CUBE.astype(ml_dtypes.int4)),
    "int4, even": (
        lambda: cast(Constant(TALL.reshape(3, 16)), ir.DataType.INT4),
        TALL.reshape(3, 16).astype(ml_dtypes.int4),
    ),
    "nested": (
        lambda: Transposed(Stacked([SideBySide([Constant(A), Constant(B)]), SideBySide([Constant(-A), Constant(B)])])),
        np.stack([np.concatenate([A, B], 1), np.concatenate([-A, B], 1)]).transpose(0, 2, 1),
    ),
}
each = pytest.mark.parametrize(("make", "value"), TENSORS.values(), ids=TENSORS.keys())


def bounds(size: int) -> st.SearchStrategy[slice]:
    begins = st.integers(0, size - 1)
    return begins.flatmap(lambda begin: st.integers(begin + 1, size).map(lambda end: slice(begin, end)))


@each
def test_the_whole_is_what_numpy_computes(make: Callable[[], LazyTensor], value: np.ndarray) -> None:
    tensor = make()
    assert tensor.dims == value.shape
    assert tensor.dtype.numpy() == value.dtype
    np.testing.assert_array_equal(tensor.numpy(), value)
    np.testing.assert_array_equal(np.asarray(tensor), value)


@each
@settings(max_examples=40)
@given(data=st.data())
def test_any_tile_is_that_rectangle(make: Callable[[], LazyTensor], value: np.ndarray, data: st.DataObject) -> None:
    tensor = make()
    batch, rows, cols = tensor.matrix
    which = data.draw(st.integers(0, batch - 1))
    across, down = data.draw(bounds(cols)), data.draw(bounds(rows))
    np.testing.assert_array_equal(tensor.tile(which, down, across), value.reshape(tensor.matrix)[which, down, across])


@each
@pytest.mark.parametrize("elements", [1, 7, 1 << 22])
def test_the_bytes_are_those_that_onnx_stores(make: Callable[[], LazyTensor], value: np.ndarray, elements: int) -> None:
    """In pieces of any size, without gap or overlap; the reference is onnx_ir's own tensor."""
    written, position = b"", 0
    for offset, data in make().chunks(elements):
        assert offset == position
        written, position = written + data, position + len(data)
    reference = ir.Tensor(value, dtype=make().dtype)
    assert written == reference.tobytes() == make().tobytes()
    assert len(written) == make().nbytes == reference.nbytes


@given(st.lists(st.integers(-8, 7), max_size=33))
def test_nibbles_are_packed_low_first(values: list[int]) -> None:
    array = np.array(values, ml_dtypes.int4)
    packed = np.frombuffer(pack_nibbles(array), np.uint8)
    unpacked = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
    signed = np.where(unpacked > 7, unpacked.astype(np.int8) - 16, unpacked)
    assert signed[: len(values)].tolist() == values
    assert not signed[len(values) :].any()


def test_a_tiling_that_does_not_cover_the_shape_is_refused() -> None:
    class Odd(Constant):
        def __init__(self) -> None:
            LazyTensor.__init__(self, ir.DataType.FLOAT, [6, 5], (1, 6, 4))

    with pytest.raises(ValueError, match="does not cover"):
        Odd()


def test_nothing_is_cast_where_nothing_changes() -> None:
    tensor = Constant(A)
    assert cast(tensor, ir.DataType.FLOAT) is tensor


def test_sources_are_named_once() -> None:
    class Named(Constant):
        @property
        def sources(self) -> tuple[str, ...]:
            return (str(self.name),)

    gate, up = Named(A, "gate"), Named(A, "up")
    assert SideBySide([gate, Transposed(Transposed(up)), gate]).sources == ("gate", "up")
