"""One call of ``l4convert::MoE`` on the plugin library, and what ONNX Runtime makes of the op's definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.plugins.library import native
from l4convert.plugins.moe import definition
from l4convert.plugins.moe.definition import Inputs, MoESpec
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from tests.in_place import session_of
from tests.plugins.interpreter import DeviceBuffer
from tests.plugins.stand_in import StandIn

BF16, FP16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(ml_dtypes.float8_e4m3fn)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Weights:
    """The weights of one product for all experts.

    Attributes:
        stored: Codes or 16-bit numbers [E, K, N], as ONNX has them.
        scale: [E, K / block, N]; None for 16-bit weights.
        block: Weights along K that share a scale; K for FP8.
    """

    stored: Array
    scale: Array | None = None
    block: int = 0

    @property
    def packed(self) -> Array:
        """As the kernels read them."""
        if self.scale is None:
            return self.stored
        by_column = np.ascontiguousarray(self.stored.swapaxes(1, 2))
        return by_column if by_column.dtype == E4M3 else pack(by_column)

    def value(self, b: Builder, name: str, initializers: list[ir.Value]) -> ir.Value:
        """The weights as a value of a graph, whose initializers they join."""
        stored = self.stored.astype(ml_dtypes.int4) if self.stored.dtype == np.int8 else self.stored
        initializers.append(_initializer(name, stored))
        if self.scale is None:
            return initializers[-1]
        initializers.append(_initializer(f"{name}_scale", self.scale))
        return b.op("DequantizeLinear", *initializers[-2:], axis=1, block_size=self.block)


def pack(codes: Array) -> Array:
    """int32 words [.., K / 8] of INT4 codes [.., K]: see layout.py."""
    shape = codes.shape[:-1]
    nibbles = (codes.astype(np.uint32) & 15).reshape(*shape, -1, GROUP)[..., list(K_ORDER)].reshape(*shape, -1, 8)
    words = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(words).view(np.int32)


@dataclass(frozen=True)
class Case:
    """A call with everything that goes in."""

    x: Array
    logits: Array
    gate_up: Weights
    down: Weights
    top_k: int = 1

    @property
    def spec(self) -> MoESpec:
        experts, hidden, _ = self.gate_up.stored.shape
        width = self.down.stored.shape[1]
        activations: definition.Activations = "fp8" if self.gate_up.stored.dtype == E4M3 else ""
        compute: Any = {BF16: "bfloat16", FP16: "float16"}[self.x.dtype]
        return MoESpec(experts, hidden, width, self.top_k, activations, compute)

    @property
    def struct(self) -> native.Moe:
        spec = self.spec
        weights = "plain" if self.gate_up.scale is None else "fp8" if spec.activations else "int4"
        compute = native.FLOATS["bf16" if self.x.dtype == BF16 else "fp16"]
        sizes = (spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.top_k)
        blocks = (self.gate_up.block, self.down.block) if weights == "int4" else (0, 0)
        return native.Moe(*sizes, compute, native.WEIGHTS[weights], *blocks)

    @cached_property
    def expected(self) -> Array:
        """What ONNX Runtime makes of the definition, float32 [T, H]."""
        spec, b = self.spec, Builder()
        stored: list[ir.Value] = []
        narrow = ir.DataType.from_numpy(self.x.dtype)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(self.x.shape))
        logits = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(self.logits.shape))
        rounded = b.op("Cast", x, to=int(narrow))
        weights = [self.gate_up.value(b, "gate_up", stored), self.down.value(b, "down", stored)]
        inputs = Inputs(rounded, logits, *weights)
        y = b.op("Cast", definition.build(b, spec, inputs), to=int(ir.DataType.FLOAT))
        y.dtype, y.shape = ir.DataType.FLOAT, ir.Shape(self.x.shape)
        graph = ir.Graph([x, logits], [y], nodes=b.nodes, initializers=stored, opset_imports={"": 23}, name="g")
        feeds = {"x": self.x.astype(np.float32), "logits": self.logits}
        result: Array = session_of(ir.Model(graph, ir_version=11)).run(None, feeds)[0]
        return result


@dataclass(frozen=True)
class Call:
    """A case on a GPU."""

    gpu: StandIn
    case: Case
    buffers: dict[str, DeviceBuffer]

    @classmethod
    def of(cls, gpu: StandIn, case: Case) -> Call:
        given = {
            "x": case.x,
            "router_logits": case.logits,
            "gate_up": case.gate_up.packed,
            "gate_up_scale": case.gate_up.scale,
            "down": case.down.packed,
            "down_scale": case.down.scale,
        }
        counted = ("gate_up", "down")
        buffers = {
            name: gpu.upload(array, name, count=name in counted) for name, array in given.items() if array is not None
        }
        return cls(gpu, case, buffers | {"y": gpu.empty(case.x.shape, case.x.dtype, "y")})

    def run(self) -> Array:
        """y as float32."""
        self.gpu.moe(self.case.struct, len(self.case.x), **self.buffers)
        return self.buffers["y"].numpy().astype(np.float32)


def relative_error(actual: Array, expected: Array) -> float:
    """max |d| / max |expected|; infinite where a number is missing."""
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def int4(random: np.random.Generator, experts: int, depth: int, columns: int, block: int, compute: Any) -> Weights:
    codes = random.integers(-8, 8, (experts, depth, columns), np.int8)
    scale = random.uniform(0.002, 0.02, (experts, depth // block, columns)).astype(compute)
    return Weights(codes, scale, block)


def fp8(random: np.random.Generator, experts: int, depth: int, columns: int, _block: int, compute: Any) -> Weights:
    codes = random.normal(0, 60, (experts, depth, columns)).clip(-448, 448).astype(E4M3)
    scale = (random.uniform(0.5, 2, (experts, 1, columns)) * 1e-3).astype(compute)
    return Weights(codes, scale, depth)


def plain(random: np.random.Generator, experts: int, depth: int, columns: int, _block: int, compute: Any) -> Weights:
    return Weights(random.normal(0, 0.05, (experts, depth, columns)).astype(compute))


MAKERS = {"int4": int4, "fp8": fp8, "plain": plain}


def make_case(
    weights: str,
    tokens: int,
    experts: int,
    hidden: int,
    width: int,
    top_k: int = 1,
    blocks: tuple[int, int] = (32, 32),
    compute: Any = BF16,
    seed: int = 0,
) -> Case:
    """A random case."""
    random = np.random.default_rng(seed)
    make = MAKERS[weights]
    return Case(
        random.standard_normal((tokens, hidden)).astype(compute),
        random.standard_normal((tokens, experts)).astype(np.float32),
        make(random, experts, hidden, 2 * width, blocks[0], compute),
        make(random, experts, width, hidden, blocks[1], compute),
        top_k,
    )


def _initializer(name: str, array: Array) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
