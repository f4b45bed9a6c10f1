"""``l4convert::MoE`` with packed weights: the form of the call that the kernels take, and its meaning as plain ONNX.

Inputs (T tokens, H hidden, E experts, I expert width; K is H and then I, N is 2I and then H):
    x [T,H]; router_logits [T,E], float32;
    gate_up words [E,2I,H/8] and down words [E,H,I/8], eight codes each, the first in the lowest bits: int32 for INT4,
        K reordered in groups (:mod:`.layout`); int64 for FP8 (E4M3 bytes), in order;
    gate_up_scale [E,H/gate_up_block,2I] and down_scale [E,I/down_block,H], of the type ``spec.compute``.
Output: y [T,H], what :mod:`.definition` gives for the weights ``code * scale``, rounded to ``spec.compute``.

FP8 words are int64 because a TensorRT tensor has at most 2^31 elements: Maverick's stacks of experts have more bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType, from_float32
from l4convert.plugins.moe import definition, layout
from l4convert.plugins.moe.definition import MoESpec

#: Codes in a word, of 4 bits or of 8.
CODES = 8
#: Changes whenever words that were packed before no longer fit the kernels; a plugin refuses calls of other versions.
LAYOUT = 1


@dataclass(frozen=True)
class PackedMoESpec(MoESpec):
    """The attributes of a call with packed weights.

    Attributes:
        weights: What the codes are.
        layout: :data:`LAYOUT` of the code that packed them.
        gate_up_block, down_block: Weights along K that share a scale; for FP8 all of K.
    """

    weights: Literal["int4", "fp8"] = "int4"
    layout: int = LAYOUT
    gate_up_block: int = 0
    down_block: int = 0

    @property
    def overload(self) -> str:
        """As that of :class:`MoESpec`, with the form of the weights."""
        return f"{super().overload}_{self.weights}_blocks{self.gate_up_block}_{self.down_block}"


class Inputs(NamedTuple):
    """The inputs of such a call in order."""

    x: ir.Value
    router_logits: ir.Value
    gate_up: ir.Value
    gate_up_scale: ir.Value
    down: ir.Value
    down_scale: ir.Value


def build(b: Builder, spec: PackedMoESpec, inputs: Inputs) -> ir.Value:
    """Append the op as plain ONNX nodes: weights [E,K,N] are unpacked, the rest is the definition."""
    hidden, width = spec.hidden_size, spec.intermediate_size
    gate_up = dequantize(b, spec, inputs.gate_up, inputs.gate_up_scale, spec.gate_up_block, (hidden, 2 * width))
    down = dequantize(b, spec, inputs.down, inputs.down_scale, spec.down_block, (width, hidden))
    return definition.build(b, spec, definition.Inputs(inputs.x, inputs.router_logits, gate_up, down))


def dequantize(
    b: Builder, spec: PackedMoESpec, words: ir.Value, scale: ir.Value, block: int, dims: tuple[int, int]
) -> ir.Value:
    """The weights [E,K,N] of a stack of words: every code times its scale, rounded once, as DequantizeLinear does it.

    Codes stay single bytes until they become values, so that what is held grows by little more than the result.
    """
    depth, width = dims
    k_first = b.op("Transpose", words, perm=[0, 2, 1])
    values = (_int4_values if spec.weights == "int4" else _fp8_values)(b, k_first, width, spec.compute)
    in_blocks = b.reshape(values, [0, depth // block, block, width])
    return b.reshape(b.op("Mul", in_blocks, b.op("Unsqueeze", scale, b.constant([2]))), [0, depth, width])


def _int4_values(b: Builder, words: ir.Value, width: int, compute: ComputeType) -> ir.Value:
    """int32 [E,K/8,N] to the two's complement numbers, [E,K/G,G,N]."""
    offset = b.op("BitwiseXor", _int4_codes(b, words, width), b.constant(8, np.uint8))  # value + 8
    wide = b.op("Sub", b.op("Cast", offset, to=int(ir.DataType.FLOAT)), b.constant(8.0, np.float32))
    return from_float32(b, wide, compute)


def _fp8_values(b: Builder, words: ir.Value, width: int, compute: ComputeType) -> ir.Value:
    """int64 [E,K/8,N] to E4M3 numbers, [E,K,N]; no operator reads a byte as one, so they are looked up."""
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(COMPUTE_TYPES[compute].numpy())
    index = b.op("Cast", _fp8_codes(b, words, width), to=int(ir.DataType.INT32))
    return b.op("Gather", b.constant(table, table.dtype), index, axis=0)


def _int4_codes(b: Builder, words: ir.Value, width: int) -> ir.Value:
    """int32 [E,K/8,N] to the codes, in order, uint8 [E,K/G,G,N]."""
    data = _bytes(b, b.op("Cast", words, to=int(ir.DataType.UINT32)), 4, width)
    low = b.op("BitwiseAnd", data, b.constant(0x0F, np.uint8))
    high = b.op("BitShift", data, b.constant(4, np.uint8), direction="RIGHT")
    axis = b.constant([2])
    slots = b.op("Concat", *(b.op("Unsqueeze", half, axis) for half in (low, high)), axis=2)
    groups = b.reshape(slots, [0, -1, layout.GROUP, width])
    return b.op("Gather", groups, b.constant(np.argsort(layout.K_ORDER)), axis=2)


def _fp8_codes(b: Builder, words: ir.Value, width: int) -> ir.Value:
    """int64 [E,K/8,N] to the codes, uint8 [E,K,N]."""
    halves = _parts(b, b.op("Cast", words, to=int(ir.DataType.UINT64)), [0, 32], ir.DataType.UINT32)
    return _bytes(b, b.reshape(halves, [0, -1, width]), 4, width)


def _bytes(b: Builder, words: ir.Value, count: int, width: int) -> ir.Value:
    """Words [E,W,N] to their bytes, the lowest first: uint8 [E,W*count,N]."""
    parts = _parts(b, words, [8 * place for place in range(count)], ir.DataType.UINT8)
    return b.reshape(parts, [0, -1, width])


def _parts(b: Builder, words: ir.Value, shifts: list[int], dtype: ir.DataType) -> ir.Value:
    """Words [E,W,N], unsigned, to the bits of a narrower type from every shift on: [E,W,shifts,N]."""
    kind = np.uint64 if dtype == ir.DataType.UINT32 else np.uint32
    amounts = b.constant(np.array(shifts).reshape(-1, 1), kind)
    shifted = b.op("BitShift", b.op("Unsqueeze", words, b.constant([2])), amounts, direction="RIGHT")
    return b.op("Cast", shifted, to=int(dtype))  # higher bits are dropped
