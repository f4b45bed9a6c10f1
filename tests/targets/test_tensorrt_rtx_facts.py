"""What TensorRT-RTX makes of operators, where our graphs rely on it or avoid it; ONNX Runtime's view beside it.

The parser runs in a process of its own, because the builder beside ONNX Runtime may crash at exit. A test that fails
after an update of tensorrt-rtx means that a lowering may become simpler, or must change.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)

FLOAT, HALF, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
FP8 = TensorProto.FLOAT8E4M3FN
SLOTS = 16

# Reads {name: [model in base64, whether to build]} and prints {name: what was said about it, "" where it is fine},
# inputs that no layer of the network uses among it.
PROBE = """
import base64, json, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.ERROR:
            self.lines.append(message)

def said_of(content, build):
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(content):
        return "parser: " + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
    given = [network.get_input(i).name for i in range(network.num_inputs)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    used = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    if set(given) - used:
        return "unused: " + ", ".join(sorted(set(given) - used))
    if not build:
        return ""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    return "" if plan is not None else "builder: " + "; ".join(log.lines)

models = json.load(sys.stdin)
print(json.dumps({name: said_of(base64.b64decode(text), build) for name, (text, build) in models.items()}))
"""


def info(name, dtype, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


def scatter(mode="linear", slots: int | str = SLOTS, dtype=FLOAT):
    """Four new tokens into a cache."""
    node = helper.make_node("TensorScatter", ["past", "new", "start"], ["present"], axis=2, mode=mode)
    cache = [1, 2, slots, 64]
    inputs = [info("past", dtype, cache), info("new", dtype, [1, 2, 4, 64]), info("start", INT64, [1])]
    return model_of([node], inputs, [info("present", dtype, cache)])


def attention(*extra: str, extra_inputs=(), outputs=("y",)):
    """Eight new tokens against all slots."""
    node = helper.make_node("Attention", ["q", "k", "v", *extra], list(outputs), scale=0.125)
    inputs = [info("q", HALF, [1, 2, 8, 64]), *(info(name, HALF, [1, 2, SLOTS, 64]) for name in "kv")]
    shapes = [[1, 2, 8, 64], [1, 2, 2 * SLOTS, 64], [1, 2, 2 * SLOTS, 64]]
    results = [info(name, HALF, shape) for name, shape in zip(outputs, shapes, strict=False)]
    return model_of([node], [*inputs, *extra_inputs], results)


def masked():
    return attention("mask", extra_inputs=[info("mask", BOOL, [1, 1, 8, SLOTS])])


def with_length():
    return attention("", "", "", "length", extra_inputs=[info("length", INT64, [1])])


def with_past():
    past = [info(name, HALF, [1, 2, SLOTS, 64]) for name in ("pk", "pv")]
    return attention("", "pk", "pv", extra_inputs=past, outputs=("y", "present_k", "present_v"))


def matmul_nbits(dtype=FLOAT):
    attributes = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
    stored = [
        numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "b"),
        numpy_helper.from_array(np.ones((32, 2), helper.tensor_dtype_to_np_dtype(dtype)), "s"),
    ]
    return model_of([node], [info("x", dtype, [1, 64])], [info("y", dtype, [1, 32])], stored)


def nonzero():
    """The tokens of an expert, say: how many there are is not known before."""
    nodes = [
        helper.make_node("NonZero", ["hit"], ["index"]),
        helper.make_node("Transpose", ["index"], ["columns"], perm=[1, 0]),
        helper.make_node("GatherND", ["x", "columns"], ["y"]),
    ]
    return model_of(nodes, [info("hit", BOOL, [16]), info("x", FLOAT, [16, 64])], [info("y", FLOAT, [None, 64])])


def gather(dtype: ir.DataType):
    """One expert of a quantized stack, then dequantized."""
    rng = np.random.default_rng(0)
    codes = ir.Tensor(rng.integers(-7, 8, (2, 64, 64)).astype(dtype.numpy()), dtype=dtype, name="codes")
    nodes = [
        helper.make_node("Gather", ["codes", "expert"], ["one"], axis=0),
        helper.make_node("DequantizeLinear", ["one", "s"], ["w"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    stored = [ir.serde.serialize_tensor(codes), numpy_helper.from_array(np.ones((2, 64), np.float32), "s")]
    inputs = [info("x", FLOAT, [1, 64]), info("expert", INT64, [])]
    return model_of(nodes, inputs, [info("y", FLOAT, [1, 64])], stored)


# Name -> (model, whether the refusal comes from the builder, a part of what is said; "" where it is taken).
FACTS: dict[str, tuple[Callable[[], onnx.ModelProto], bool, str]] = {
    "a cache written in place": (scatter, True, ""),
    "a circular cache": (lambda: scatter("circular"), False, 'Assertion failed: mode == "linear"'),
    "a cache of symbolic length": (lambda: scatter(slots="slots"), False, "must have a static sequence length"),
    "a cache of INT8": (lambda: scatter(dtype=TensorProto.INT8), False, "must have type Float, Half, or BFloat16"),
    "a cache of FP8": (lambda: scatter(dtype=FP8), False, "must have type Float, Half, or BFloat16"),
    "attention under a mask": (masked, True, ""),
    "attention with lengths": (with_length, False, "unused: length"),  # parsed, and silently not applied
    "attention with a past": (with_past, False, "only supports Attention nodes with one output"),
    "MatMulNBits": (matmul_nbits, False, "input tensor A must be FP16"),
    "MatMulNBits in float16": (lambda: matmul_nbits(HALF), False, "failed to load MatMulNBits plugin"),
    "NonZero": (nonzero, False, "NonZero plugin creator version 1 was not found"),
    "a gather of FP8": (lambda: gather(ir.DataType.FLOAT8E4M3FN), True, "has datatype FP8 but is not consumed by"),
    "a gather of INT4": (lambda: gather(ir.DataType.INT4), True, "has datatype Int4 but is not consumed by"),
}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    models = {
        name: [base64.b64encode(make().SerializeToString()).decode(), build] for name, (make, build, _) in FACTS.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(models), capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.parametrize("name", FACTS)
def test_the_parser_and_the_builder(said, name):
    _, _, expected = FACTS[name]
    assert expected in said[name]
    assert bool(expected) is bool(said[name]), said[name]


def session_of(model: onnx.ModelProto):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


TAKEN_ELSEWHERE = ["a circular cache", "a cache of symbolic length", "attention with a past", "MatMulNBits", "NonZero"]


@pytest.mark.parametrize("name", TAKEN_ELSEWHERE)
def test_onnx_runtime_takes_what_is_refused(name):
    """So a graph that runs there proves nothing about what the parser takes."""
    session_of(FACTS[name][0]())


def test_only_onnx_runtime_sees_lengths_so_our_graphs_have_masks():
    """The same attention by lengths and by the mask that they stand for."""
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.standard_normal((1, 2, n, 64)).astype(np.float16)
        for name, n in (("q", 8), ("k", SLOTS), ("v", SLOTS))
    }
    visible = np.broadcast_to(np.arange(SLOTS) < 5, (1, 1, 8, SLOTS))
    (by_mask,) = session_of(masked()).run(None, {**feeds, "mask": np.ascontiguousarray(visible)})
    (by_length,) = session_of(with_length()).run(None, {**feeds, "length": np.array([5])})
    (of_all,) = session_of(with_length()).run(None, {**feeds, "length": np.array([SLOTS])})
    np.testing.assert_allclose(by_length, by_mask, atol=2e-3)
    assert np.abs(by_length - of_all).max() > 0.1
