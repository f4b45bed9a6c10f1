"""Small models with lazy weights, and folders to write them to, for the emit tests."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor

NUMPY_DTYPES = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    ir.DataType.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    ir.DataType.INT4: np.dtype(ml_dtypes.int4),
    ir.DataType.UINT8: np.dtype(np.uint8),
    ir.DataType.INT64: np.dtype(np.int64),
    ir.DataType.BOOL: np.dtype(np.bool_),
}


class Weight(LazyTensor):
    """An array that poses as a checkpoint's tensor and records which rows were asked for."""

    def __init__(self, array: np.ndarray, source: str = "source", log: list[str] | None = None) -> None:
        super().__init__(ir.DataType.from_numpy(array.dtype), array.shape)
        self.array = array.reshape(self.matrix)
        self.source = source
        self.log = log if log is not None else []

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        self.log.append(f"{self.name}:{batch}:{rows.start}")
        return self.array[batch, rows, cols]


def values(dtype: ir.DataType, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Finite pseudo-random values of any type."""
    numbers = np.random.default_rng(seed).integers(-7, 8, size=tuple(shape))
    if dtype in {ir.DataType.UINT8, ir.DataType.BOOL}:
        numbers = np.abs(numbers)
    return numbers.astype(NUMPY_DTYPES[dtype])


def initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )


def holder(tensors: dict[str, ir.TensorProtocol]) -> ir.Model:
    """A valid model that carries initializers and computes y = x."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Identity", [x])
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    initializers = [initializer(name, tensor) for name, tensor in tensors.items()]
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 23}, name="main")
    return ir.Model(graph, ir_version=11)


def two_layer(width: int = 64, seed: int = 1) -> ir.Model:
    """y = MatMul(x, float32 weight): one page-aligned weight, one odd bias, one small inline scale."""
    rng = np.random.default_rng(seed)
    weight = initializer("weight", Weight(rng.standard_normal((width, width)).astype(np.float32), "a.weight"))
    bias = initializer("bias", Weight(rng.standard_normal((300, width)).astype(np.float32)[:width], "a.bias"))
    scale = initializer("scale", ir.tensor(np.array([0.5], np.float32)))
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([width, width]))
    product = ir.node("MatMul", [x, weight])
    added = ir.node("Add", [product.outputs[0], bias])
    scaled = ir.node("Mul", [added.outputs[0], scale])
    out = scaled.outputs[0]
    out.name, out.type, out.shape = "y", x.type, x.shape
    nodes = [product, added, scaled]
    graph = ir.Graph([x], [out], nodes=nodes, initializers=[weight, bias, scale], opset_imports={"": 23}, name="main")
    return ir.Model(graph, ir_version=11)
