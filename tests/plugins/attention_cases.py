"""Calls of ``l4convert::LongContextAttention`` with numbers in them, and what ONNX Runtime says they give.

The reference is the op's own body (``definition.build``) in ONNX Runtime. Its inputs and outputs are float32 here and
cast inside the graph, which is exact: the numbers are of the types that the op has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.frontend.builder import Builder
from l4convert.plugins.library import native
from l4convert.plugins.long_context_attention import definition
from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.quantization.kv import KV_FORMATS
from l4convert.runtime.cpu_form import to_cpu_form

NUMPY: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
STORED: dict[str, Any] = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
THETA = 10_000.0

CHUNKED = AttentionSpec(
    num_heads=5,
    kv_num_heads=1,
    head_dim=16,
    chunk_size=32,
    rope=True,
    qk_norm_eps=1e-5,
    floor_scale=1.0,
    attn_scale=0.0,
    kv_cache="static",
    compute="bfloat16",
)
GLOBAL = replace(CHUNKED, chunk_size=0, rope=False, qk_norm_eps=0.0, floor_scale=8.0, attn_scale=0.1)


@dataclass(frozen=True)
class Call:
    """One call's inputs, named as in :class:`definition.Inputs`, in the types of the op; absent ones are None."""

    spec: AttentionSpec
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    past_key: np.ndarray
    past_value: np.ndarray
    positions: np.ndarray
    cos: np.ndarray | None
    sin: np.ndarray | None
    key_scale: np.ndarray | None
    value_scale: np.ndarray | None

    @property
    def new_tokens(self) -> int:
        """S."""
        return int(self.query.shape[1])

    @property
    def new_positions(self) -> np.ndarray:
        """int64 [B,S]."""
        return self.positions[:, -self.new_tokens :]


@dataclass(frozen=True)
class Result:
    """attention, present_key and present_value in float32."""

    attention: np.ndarray
    present_key: np.ndarray
    present_value: np.ndarray


def positions_of(past: list[int], new: list[int], new_tokens: int, left: bool = False) -> np.ndarray:
    """int64 [B,T] for sequences with so many past and new tokens; padding in front of the new ones or behind them.

    Columns before the last ``new_tokens`` matter to the definition only by the highest position in them.
    """
    columns = max(past)
    rows = []
    for before, count in zip(past, new, strict=True):
        earlier = [*range(before), *[-1] * (columns - before)]
        real, padding = [*range(before, before + count)], [-1] * (new_tokens - count)
        rows.append([*earlier, *(padding + real if left else real + padding)])
    return np.array(rows, np.int64)


def make_call(
    spec: AttentionSpec,
    positions: np.ndarray,
    new_tokens: int,
    capacity: int,
    seed: int = 0,
    granularity: str = "head",
    spread: float = 1.0,
) -> Call:
    """Random numbers for everything; all slots of the caches are filled, so that one too many shows."""
    rng = np.random.default_rng(seed)
    batch = len(positions)
    heads, kv_heads, width = spec.num_heads, spec.kv_num_heads, spec.head_dim

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(NUMPY[spec.compute])

    query = normal(batch, new_tokens, heads * width)
    key, value = (normal(batch, new_tokens, kv_heads * width) for _ in range(2))
    scales: list[np.ndarray | None] = [None, None]
    if spec.kv_dtype == "none":
        past = [normal(batch, kv_heads, capacity, width) for _ in range(2)]
    else:
        shape = (1, kv_heads, 1, width if granularity == "channel" else 1)
        size = 3.0 / KV_FORMATS[spec.kv_dtype].highest * spread
        scales = [
            np.broadcast_to(rng.uniform(0.5, 1.5, shape).astype(np.float32) * size, (1, kv_heads, 1, width)).copy()
            for _ in range(2)
        ]
        limit = KV_FORMATS[spec.kv_dtype].highest
        past = [
            np.clip(rng.standard_normal((batch, kv_heads, capacity, width)) * limit / 3, -limit, limit)
            .astype(np.float32)
            .astype(STORED[spec.kv_dtype])
            for _ in range(2)
        ]
    cos = sin = None
    if spec.rope:
        rows = spec.chunk_size or capacity
        angle = np.arange(rows)[:, None] * THETA ** (-np.arange(0, width, 2) / width)
        cos, sin = (table.astype(np.float32) for table in (np.cos(angle), np.sin(angle)))
    return Call(spec, query, key, value, past[0], past[1], positions, cos, sin, scales[0], scales[1])


def expected(call: Call) -> Result:
    """What the function's body gives."""
    feeds = {
        name: np.asarray(array if name == "positions" else array.astype(np.float32))
        for name, array in ((name, getattr(call, name)) for name in definition.input_names(call.spec))
    }
    outputs = _session(call.spec).run(None, feeds)
    return Result(*outputs)


@cache
def _session(spec: AttentionSpec) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Its DivMulFusion makes x / scale of the definition's x * (1 / scale), which rounds otherwise now and then.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(body_model(spec)).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def body_model(spec: AttentionSpec) -> ir.Model:
    """The function's body as a graph with float32 inputs (positions: int64) and outputs."""
    b = Builder()
    names = definition.input_names(spec)
    inputs = {
        name: ir.Value(
            name=name, type=ir.TensorType(ir.DataType.INT64 if name == "positions" else ir.DataType.FLOAT), shape=None
        )
        for name in names
    }
    for name, rank in (("query", 3), ("key", 3), ("value", 3), ("past_key", 4), ("past_value", 4), ("positions", 2)):
        inputs[name].shape = ir.Shape([f"{name}_{axis}" for axis in range(rank)])
    typed: dict[str, Any] = dict.fromkeys(definition.Inputs._fields)
    for name, value in inputs.items():
        dtype = _type_of(spec, name)
        typed[name] = value if dtype is None else b.op("Cast", value, to=int(dtype))
        if dtype is not None:
            typed[name].dtype = dtype
    outputs = definition.build(b, spec, definition.Inputs(**typed))
    results = [b.op("Cast", value, to=int(ir.DataType.FLOAT)) for value in outputs]
    for value in results:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(list(inputs.values()), results, nodes=b.nodes, opset_imports={"": 23}, name="body")
    model = ir.Model(graph, ir_version=10)
    to_cpu_form(model)
    return model


def _type_of(spec: AttentionSpec, name: str) -> ir.DataType | None:
    if name in ("query", "key", "value") or (name.startswith("past") and spec.kv_dtype == "none"):
        return {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}[spec.compute]
    if name.startswith("past"):
        assert spec.kv_dtype != "none"
        return KV_FORMATS[spec.kv_dtype].storage
    return None


class Run:
    """The same call by the plugin library, on a :class:`tests.plugins.stand_in.StandIn`, and its buffers.

    Args:
        gpu: The stand-in.
        call: What to compute.
        in_place: Whether past and present are one buffer.
        count: Count how often every byte of the caches is loaded.
        given: Buffers to use in place of the call's arrays.
        capacity: Slots of given caches.
    """

    def __init__(
        self,
        gpu: Any,
        call: Call,
        in_place: bool = True,
        count: bool = False,
        given: Mapping[str, Any] | None = None,
        capacity: int | None = None,
    ) -> None:
        spec, self.gpu, self.call = call.spec, gpu, call
        buffers = dict(given or {})
        for name in definition.input_names(spec):
            if name not in buffers:
                buffers[name] = gpu.upload(getattr(call, name), name, count and name.startswith("past"))
        shape = shape_of(call)
        shape.capacity = capacity or shape.capacity
        self.attention = gpu.empty(call.query.shape, call.query.dtype, "attention")
        self.present = [
            buffers[f"past_{part}"]
            if in_place
            else gpu.empty(call.past_key.shape, call.past_key.dtype, f"present_{part}")
            for part in ("key", "value")
        ]
        self.buffers = buffers
        gpu.reset_counts()
        gpu.attention(
            attributes_of(spec),
            shape,
            **buffers,
            attention=self.attention,
            present_key=self.present[0],
            present_value=self.present[1],
        )

    def result(self) -> Result:
        """What it gave; the buffers are freed."""
        found = Result(*(buffer.numpy().astype(np.float32) for buffer in (self.attention, *self.present)))
        self.gpu.free(*{*self.buffers.values(), self.attention, *self.present})
        return found


def attributes_of(spec: AttentionSpec) -> native.Attention:
    """As the library takes them."""
    return native.Attention(
        num_heads=spec.num_heads,
        kv_num_heads=spec.kv_num_heads,
        head_dim=spec.head_dim,
        chunk_size=spec.chunk_size,
        rope=spec.rope,
        qk_norm_eps=spec.qk_norm_eps,
        floor_scale=spec.floor_scale,
        attn_scale=spec.attn_scale,
        compute=native.FLOATS["bf16" if spec.compute == "bfloat16" else "fp16"],
        kv_dtype=native.KV_DTYPES[spec.kv_dtype],
    )


def shape_of(call: Call) -> native.AttentionShape:
    """As the library takes them."""
    return native.AttentionShape(
        batch=len(call.positions),
        new_tokens=call.new_tokens,
        seen_tokens=call.positions.shape[1],
        capacity=call.past_key.shape[2],
        table_rows=0 if call.cos is None else len(call.cos),
    )


def relative_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest number."""
    assert actual.size
    assert np.isfinite(actual).all()
    return float(np.abs(actual - wanted).max() / np.abs(wanted).max())


def cache_errors(call: Call, actual: Result, wanted: Result) -> tuple[float, float]:
    """Largest relative differences of present keys and values; slots that the call does not write must be untouched."""
    for before, after, reference in (
        (call.past_key, actual.present_key, wanted.present_key),
        (call.past_value, actual.present_value, wanted.present_value),
    ):
        past = before.astype(np.float32)
        kept = (reference == past).all(axis=-1)
        np.testing.assert_array_equal(after[kept], past[kept])
    return (
        relative_error(actual.present_key, wanted.present_key),
        relative_error(actual.present_value, wanted.present_value),
    )
