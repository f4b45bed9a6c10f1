"""The same calls through the TensorRT plugins: created, configured, serialized, made again and enqueued, no TensorRT.

What drives them is the conformance harness (plugins/library/conformance); it is built beside the library where there
are TensorRT's headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from gpu_library import Kernels, Refused
from gpu_tensors import AttentionTensors, MoeTensors
from roofline import Experts

from l4convert.errors import L4Error
from l4convert.plugins.library.calling import PluginCall
from l4convert.plugins.long_context_attention.definition import AttentionSpec, input_names

Attributes = Mapping[str, int | float | str]


class PluginKernels(Kernels):
    """A library whose calls go through ``IPluginV3``."""

    def moe(self, experts: Experts, compute: str, tensors: MoeTensors) -> Callable[[], None]:
        """As :meth:`Kernels.moe`."""
        attributes: dict[str, int | float | str] = {
            "num_experts": experts.num_experts, "hidden_size": experts.hidden_size,
            "intermediate_size": experts.intermediate_size, "top_k": experts.top_k,
            "activations": "fp8" if experts.weights == "fp8" else "", "compute": compute,
        }  # fmt: skip
        weights = tensors.weights
        if experts.weights == "plain":
            inputs = [tensors.x, tensors.router_logits, weights.gate_up, weights.down]
        else:
            attributes |= {"weights": experts.weights}
            if experts.block:
                attributes |= {"gate_up_block": experts.block, "down_block": experts.block}
            stored = [weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale]
            inputs = [tensors.x, tensors.router_logits, *stored]
        return self._through_plugin("MoE", attributes, inputs, [tensors.y])

    def attention(self, spec: AttentionSpec, tensors: AttentionTensors) -> Callable[[], None]:
        """As :meth:`Kernels.attention`."""
        attributes = {name: int(value) if isinstance(value, bool) else value for name, value in asdict(spec).items()}
        inputs = [getattr(tensors, name) for name in input_names(spec)]
        outputs = [tensors.attention, tensors.past_key, tensors.past_value]
        return self._through_plugin("LongContextAttention", attributes, inputs, outputs)

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
