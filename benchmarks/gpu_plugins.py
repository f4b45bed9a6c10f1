"""The same calls through the TensorRT plugins: created, configured, serialized, made again and enqueued, no TensorRT.

What drives them is the conformance harness (plugins/library/conformance); it is built beside the library where there
are TensorRT's headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from gpu_library import Kernels, Refused
from gpu_tensors import AttentionTensors, MoeTensors
from roofline import Experts

from l4convert.errors import L4Error
from l4convert.plugins.library.calling import PluginCall
from l4convert.plugins.long_context_attention.definition import AttentionSpec, input_names
from l4convert.plugins.moe.definition import MoESpec
from l4convert.plugins.moe.packed import PackedMoESpec

Attributes = Mapping[str, int | float | str]


def attributes_of(spec: MoESpec | AttentionSpec) -> Attributes:
    """As an ONNX node has them: flags are integers."""
    return {name: int(value) if isinstance(value, bool) else value for name, value in asdict(spec).items()}


class PluginKernels(Kernels):
    """A library whose calls go through ``IPluginV3``."""

    def moe(self, experts: Experts, compute: Any, tensors: MoeTensors) -> Callable[[], None]:
        """As :meth:`Kernels.moe`."""
        weights, sizes = tensors.weights, (experts.num_experts, experts.hidden_size, experts.intermediate_size)
        inputs, spec = [tensors.x, tensors.router_logits], MoESpec(*sizes, experts.top_k, compute=compute)
        if experts.weights == "plain":
            inputs += [weights.gate_up, weights.down]
        else:
            inputs += [weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale]
            blocks = (experts.block or experts.hidden_size, experts.block or experts.intermediate_size)
            activations: Literal["", "fp8"] = "fp8" if experts.weights == "fp8" else ""
            spec = PackedMoESpec(
                *sizes, experts.top_k, activations, compute, weights=experts.weights,
                gate_up_block=blocks[0], down_block=blocks[1],
            )  # fmt: skip
        return self._through_plugin("MoE", attributes_of(spec), inputs, [tensors.y])

    def attention(self, spec: AttentionSpec, tensors: AttentionTensors) -> Callable[[], None]:
        """As :meth:`Kernels.attention`."""
        inputs = [getattr(tensors, name) for name in input_names(spec)]
        outputs = [tensors.attention, tensors.past_key, tensors.past_value]
        return self._through_plugin("LongContextAttention", attributes_of(spec), inputs, outputs)

    def _through_plugin(
        self, plugin: str, attributes: Attributes, inputs: list[Any], outputs: list[Any]
    ) -> Callable[[], None]:
        try:
            call = PluginCall(self.library.path, plugin, attributes, [tensor.shape for tensor in inputs])
        except L4Error as error:
            raise Refused(str(error)) from None
        scratch = self._scratch(lambda: call.workspace)
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]

        def enqueue(stream: int) -> None:
            with call:
                call.enqueue(*addresses, scratch.data_ptr(), stream)

        return self._call(enqueue, (*inputs, *outputs, scratch))
