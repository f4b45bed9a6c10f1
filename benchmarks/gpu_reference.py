"""The functions' bodies (``definition.build`` of each plugin) on the CPU: what kernels are compared with.

They run in ONNX Runtime, or where that is not installed in ``onnx.reference``. bfloat16 is rounded where the body
rounds it and computed in float32 between (``l4convert/runtime/cpu_form.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from gpu_tensors import AttentionTensors, MoeTensors, dense
from roofline import Experts

from l4convert.frontend.builder import Builder
from l4convert.plugins.long_context_attention import definition as attention
from l4convert.plugins.long_context_attention.definition import AttentionSpec
from l4convert.plugins.moe import definition as moe
from l4convert.plugins.moe.definition import MoESpec
from l4convert.runtime.cpu_form import to_cpu_form

OPSET, IR_VERSION = 23, 11
Arrays = Mapping[str, np.ndarray]
Body = Callable[[Builder, Mapping[str, ir.Value]], Sequence[ir.Value]]


def moe_body(torch: Any, spec: MoESpec, experts: Experts, tensors: MoeTensors) -> np.ndarray:
    """``y`` float32 [T,H] of the body on the weights that the codes stand for."""
    matrices = [dense(torch, experts, tensors.weights, expert) for expert in range(spec.num_experts)]
    gate_up, down = (torch.stack(part) for part in zip(*matrices, strict=True))
    values = {"x": tensors.x, "router_logits": tensors.router_logits, "gate_up": gate_up, "down": down}

    def body(b: Builder, inputs: Mapping[str, ir.Value]) -> Sequence[ir.Value]:
        return [moe.build(b, spec, moe.Inputs(**inputs))]

    return run_body(body, {name: on_host(torch, value) for name, value in values.items()})[0]


def attention_body(torch: Any, spec: AttentionSpec, tensors: AttentionTensors) -> tuple[np.ndarray, ...]:
    """attention [B,S,Hq*D], present_key and present_value [B,Hk,M,D] of the body, as numbers (codes, if quantized)."""
    names = attention.input_names(spec)
    values = {name: on_host(torch, getattr(tensors, name)) for name in names}

    def body(b: Builder, inputs: Mapping[str, ir.Value]) -> Sequence[ir.Value]:
        given = {name: inputs.get(name) for name in attention.Inputs._fields}
        return attention.build(b, spec, attention.Inputs(**given))  # type: ignore[arg-type]

    return tuple(run_body(body, values))


def on_host(torch: Any, tensor: Any) -> np.ndarray:
    """A tensor as an array of the same type."""
    kinds = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in kinds:
        array: np.ndarray = tensor.numpy()
        return array
    bits, dtype = kinds[tensor.dtype]
    return tensor.view(bits).numpy().view(dtype)  # type: ignore[no-any-return]


def run_body(body: Body, arrays: Arrays) -> list[np.ndarray]:
    """Build a graph of the body alone and run it; outputs in float32."""
    model = ir.Model(_graph(body, arrays), ir_version=IR_VERSION)
    to_cpu_form(model)
    content = ir.to_proto(model)
    try:
        import onnxruntime
    except ImportError:
        return _in_onnx(content, arrays)
    from l4convert.runtime.ort_values import as_float32, ort_value

    options = onnxruntime.SessionOptions()
    # What is compared is the body as written, not what an optimizer would make of it.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run_with_ort_values(names, {name: ort_value(array) for name, array in arrays.items()})
    return [as_float32(value) for value in values]


def _in_onnx(model: Any, arrays: Arrays) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return [np.asarray(value).astype(np.float32) for value in ReferenceEvaluator(model).run(None, dict(arrays))]


def _graph(body: Body, arrays: Arrays) -> ir.Graph:
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for name, array in arrays.items()
    }
    b = Builder()
    outputs = list(body(b, inputs))
    return ir.Graph(list(inputs.values()), outputs, nodes=b.nodes, opset_imports={"": OPSET}, name="body")
