"""The same work through ONNX Runtime's CUDA kernels, QMoE and GroupQueryAttention: graphs of one node each.

Inputs and outputs are torch's memory, weights the session's own (random codes: only the time is of interest). Calls are
put on one stream one after the other without waiting between; no CUDA graph, so what ONNX Runtime does on the host for
a call shows where that is longer than the kernel. Sources of the nodes' inputs: docs/adr/0016-cuda-kernels.md.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from gpu_tensors import AttentionTensors, MoeTensors
from roofline import Attention, Experts

from l4convert.checkpoint.presets import SCOUT
from l4convert.frontend.builder import Builder
from l4convert.graph_passes.lower_moe_to_qmoe import CONTRIB, SWIGLU
from l4convert.quantization.kv import KV_FORMATS

OPSET, IR_VERSION = 23, 11
LARGEST_WEIGHTS = 4 << 30  # what is worth writing to a temporary file
REPEAT, RUNS, WARM = 11, 10, 3
TYPES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}


class NotHere(Exception):
    """Why ONNX Runtime does not do this, in one line."""


def cuda_runtime() -> Any:
    """The module, with its CUDA provider.

    Raises:
        NotHere: It is not installed, or without the provider.
    """
    try:
        import onnxruntime
    except ImportError:
        raise NotHere("onnxruntime-gpu is not installed") from None
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise NotHere("this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    return onnxruntime


def qmoe_model(experts: Experts, compute: str = "bfloat16", prepacked: bool = False, seed: int = 0) -> ir.Model:
    """A graph of ``QMoE``: x [T,H] and router [T,E] -> y [T,H].

    Raises:
        NotHere: These weights are not for it.
    """
    if experts.weights != "int4":
        raise NotHere("QMoE has no FP8 weights with one scale a column")
    if experts.num_experts * experts.expert_bytes > LARGEST_WEIGHTS:
        raise NotHere("the weights are too large for a model file made on the way")
    rng, b, dtype = np.random.default_rng(seed), Builder(), TYPES[compute]
    x, router = (_input(name, dtype, ("T", width)) for name, width in
                 (("x", experts.hidden_size), ("router", experts.num_experts)))  # fmt: skip
    values: dict[str, ir.Value] = {}
    sizes = ((2 * experts.intermediate_size, experts.hidden_size), (experts.hidden_size, experts.intermediate_size))
    for number, (columns, inner) in enumerate(sizes, 1):
        codes = rng.integers(0, 256, (experts.num_experts, columns, inner // 2), np.uint8)
        scales = rng.uniform(0.5, 1.5, (experts.num_experts, columns, inner // experts.block)) / (4.6 * inner**0.5)
        values[f"w{number}"] = _constant(f"w{number}", codes)
        values[f"s{number}"] = _constant(f"s{number}", scales.astype(dtype.numpy()))
    inputs = [x, router, values["w1"], values["s1"], None, values["w2"], values["s2"]]
    layout = {} if prepacked else {"weights_prepacked": 0}
    options = {"expert_weight_bits": 4, "block_size": experts.block, **SWIGLU, **layout}
    (y,) = b.node("QMoE", inputs, domain=CONTRIB, **options)
    return _model(b, [x, router], [_typed(y, dtype, ("T", experts.hidden_size))], values.values())


def gqa_model(layer: Attention, compute: str = "bfloat16", prepares: bool = True) -> ir.Model:
    """A graph of ``GroupQueryAttention`` over shared buffers; ``prepares``: the node itself rotates and norms."""
    b, dtype, width = Builder(), TYPES[compute], layer.head_dim
    cache_type = dtype if layer.kv == "none" else KV_FORMATS[layer.kv].storage  # type: ignore[index]
    heads = (layer.num_heads, layer.kv_num_heads, layer.kv_num_heads)
    new = [_input(name, dtype, ("B", "S", n * width)) for name, n in zip(("query", "key", "value"), heads, strict=True)]
    past = [_input(name, cache_type, ("B", layer.kv_num_heads, "M", width)) for name in ("past_key", "past_value")]
    lengths = [_input("last", ir.DataType.INT32, ("B",)), _input("total", ir.DataType.INT32, ())]
    optional: list[ir.Value | None] = [None] * 9
    attributes: dict[str, Any] = {}
    if layer.chunk_size and prepares:
        optional[0:2] = [_input(name, dtype, ("R", width // 2)) for name in ("cos", "sin")]
        ones = _constant("ones", np.ones(width, dtype.numpy()))
        optional[7] = optional[8] = ones
        attributes |= {"do_rotary": 1, "rotary_interleaved": 1, "qk_norm_epsilon": SCOUT.rms_norm_eps}
    if layer.kv != "none":
        shape = (1, layer.kv_num_heads, 1, width)
        optional[5:7] = [_input(name, ir.DataType.FLOAT, shape) for name in ("key_scale", "value_scale")]
        bits = 8 // KV_FORMATS[layer.kv].packing  # type: ignore[index]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    given = [*new, *past, *lengths, *optional]
    while given[-1] is None:
        given.pop()
    results = b.node(
        "GroupQueryAttention", given, outputs=3, domain=CONTRIB, num_heads=layer.num_heads,
        kv_num_heads=layer.kv_num_heads, scale=width**-0.5, **attributes,
    )  # fmt: skip
    shapes = [("B", "S", layer.num_heads * width), *[("B", layer.kv_num_heads, "M", width)] * 2]
    types = (dtype, cache_type, cache_type)
    outputs = [_typed(value, kind, shape) for value, kind, shape in zip(results, types, shapes, strict=True)]
    for value, name in zip(outputs, ("attention", "present_key", "present_value"), strict=True):
        value.name = name
    constants = [value for value in given if value is not None and value.const_value is not None]
    inputs = [value for value in given if value is not None and value.const_value is None]
    return _model(b, inputs, outputs, dict.fromkeys(constants))


def _input(name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    return _typed(ir.Value(name=name), dtype, shape)


def _typed(value: ir.Value, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value


def _constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _model(b: Builder, inputs: list[ir.Value], outputs: list[ir.Value], constants: Iterable[ir.Value]) -> ir.Model:
    imports = {"": OPSET, CONTRIB: 1}
    kept = list(constants)
    graph = ir.Graph(inputs, outputs, nodes=b.nodes, initializers=kept, opset_imports=imports, name="peer")
    return ir.Model(graph, ir_version=IR_VERSION)


class Session:
    """A model on one CUDA stream of torch's, bound to torch's memory."""

    def __init__(self, torch: Any, model: ir.Model) -> None:
        self.torch, self.runtime = torch, cuda_runtime()
        self.stream = torch.cuda.Stream()
        provider = ("CUDAExecutionProvider", {"user_compute_stream": str(self.stream.cuda_stream)})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "peer.onnx"
            ir.save(model, path, external_data="weights.bin")
            self.session = self.runtime.InferenceSession(str(path), providers=[provider])
        self.options = self.runtime.RunOptions()
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bound(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
        """A binding of names to tensors; those on the CPU stay there."""
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                element = _element(self.torch, tensor)
                bind(name, tensor.device.type, 0, element, list(tensor.shape), tensor.data_ptr())
        return binding

    def seconds(self, binding: Any) -> float:
        """Of one run, the median of :data:`REPEAT` times :data:`RUNS`."""
        torch, times = self.torch, []
        torch.cuda.synchronize()  # the inputs were made on another stream
        with torch.cuda.stream(self.stream):
            for number in range(WARM + REPEAT):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(RUNS):
                    self.session.run_with_iobinding(binding, self.options)
                end.record()
                end.synchronize()
                if number >= WARM:
                    times.append(begin.elapsed_time(end) / 1e3 / RUNS)
        return statistics.median(times)


def _element(torch: Any, tensor: Any) -> int:
    """ONNX's number of a tensor's type."""
    names = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT", torch.int32: "INT32",
             torch.int8: "INT8", torch.float8_e4m3fn: "FLOAT8E4M3FN"}  # fmt: skip
    return int(ir.DataType[names[tensor.dtype]])


def moe_seconds(session: Session, tensors: MoeTensors) -> float:
    """QMoE on the tokens of a call; each goes to the expert with the best logit."""
    best = tensors.router_logits == tensors.router_logits.amax(dim=1, keepdim=True)
    inputs = {"x": tensors.x, "router": best.to(tensors.x.dtype)}
    (name,) = (output.name for output in session.session.get_outputs())
    return session.seconds(session.bound(inputs, {name: tensors.y}))


def attention_seconds(session: Session, tensors: AttentionTensors, layer: Attention, new: int, context: int) -> float:
    """GroupQueryAttention on a call whose tokens lie in one chunk.

    Raises:
        NotHere: They do not.
    """
    torch, total = session.torch, layer.past(new, context) + new
    if total > tensors.past_key.shape[2]:
        raise NotHere("one call of GroupQueryAttention stays in one chunk")
    last = torch.full((len(tensors.query),), total - 1, dtype=torch.int32, device="cuda")
    inputs = {"last": last, "total": torch.tensor(total, dtype=torch.int32)}
    inputs |= {name: getattr(tensors, name) for name in ("query", "key", "value", "past_key", "past_value")}
    if layer.chunk_size:
        inputs |= {name: getattr(tensors, name).to(tensors.query.dtype) for name in ("cos", "sin")}
    if layer.kv != "none":
        inputs |= {name: getattr(tensors, name) for name in ("key_scale", "value_scale")}
    outputs = {"attention": tensors.attention, "present_key": tensors.past_key, "present_value": tensors.past_value}
    return session.seconds(session.bound(inputs, outputs))
