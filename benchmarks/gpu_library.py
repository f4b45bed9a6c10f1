"""The plugin library on this GPU: built for it where that is still to be done, and called on torch's tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_tensors import AttentionTensors, MoeTensors
from roofline import Experts

from l4convert.errors import L4Error
from l4convert.plugins.library import native
from l4convert.plugins.long_context_attention.definition import AttentionSpec

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / "build" / "plugins"
SHORT = {"bfloat16": "bf16", "float16": "fp16"}  # as the names of kernels have it
MISSING = 5  # exit code of the command where a tool that it needs is not installed
POISON = 0xFF  # scratch memory starts as NaN in every type

Call = Callable[[], None]


class Refused(Exception):
    """Why the library does not do this, in its own words."""


class NotBuilt(Exception):
    """Why there is no library for this GPU, in one line; ``failed``: it is not that something is not installed."""

    def __init__(self, reason: str, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


def build_for(sm: int, head_dim: int = 128) -> Path:
    """The library for one SM and heads of one width; what was compiled before is not compiled again.

    Raises:
        NotBuilt: The build failed; with its error.
    """
    output = BUILT / f"sm{sm}-{head_dim}"
    what = ["--sm", sm, "--head-dim", head_dim]
    arguments = ["plugins", "build", *what, "--output", output, "--cache", BUILT / "cache", "--overwrite"]
    command = [sys.executable, "-m", "l4convert", *map(str, arguments)]
    # Kernels that were decorated under the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        reason = (errors or done.stderr.splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
        raise NotBuilt(reason, failed=done.returncode != MISSING)
    return output / "libl4convert_plugins.so"


class Kernels:
    """A library in torch's CUDA context, or on whatever stands in for one.

    Args:
        torch: The module.
        library: The file.
        device: "cuda", or "cpu" where a driver that works on the host's memory stands in.
        sm: Compute capability of the device, 90 for 9.0.
        multiprocessors: Of the device.
    """

    def __init__(self, torch: Any, library: Path, device: str, sm: int, multiprocessors: int) -> None:
        self.torch, self.device, self.sm, self.multiprocessors = torch, device, sm, multiprocessors
        self.library = native.load(library)

    def preload(self) -> None:
        """Load every kernel now: it may not happen while a graph is recorded."""
        for op in ("moe", "long_context_attention"):
            self.library.preload(op)

    def lacks(self, compute: str) -> str:
        """Why there are no kernels for a type of activations in this library; nothing where there are some."""
        short = SHORT[compute]
        if any(short in kernel.name.split("_") for kernel in self.library.kernels):
            return ""
        return f"the library was built without --compute {short}"

    def synchronize(self) -> None:
        """Wait until everything is written."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def moe(self, experts: Experts, compute: str, tensors: MoeTensors) -> Call:
        """A call of the MoE on torch's current stream.

        Raises:
            Refused: There is no kernel for it.
        """
        moe = native.Moe(
            experts.num_experts, experts.hidden_size, experts.intermediate_size, experts.top_k,
            native.FLOATS[SHORT[compute]], native.WEIGHTS[experts.weights], experts.block, experts.block,
        )  # fmt: skip
        tokens, weights = len(tensors.x), tensors.weights
        workspace = self._scratch(lambda: self.library.moe_workspace(moe, tokens))
        held = (
            tensors.x, tensors.router_logits, weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale,
            tensors.y, workspace,
        )  # fmt: skip
        buffers = native.MoeBuffers(*map(_address, held))
        return self._call(lambda stream: self.library.moe_enqueue(moe, tokens, buffers, stream), held)

    def attention(self, spec: AttentionSpec, tensors: AttentionTensors) -> Call:
        """A call of the attention on torch's current stream; the cache is written in place.

        Raises:
            Refused: There is no kernel for it.
        """
        attention = native.Attention(
            spec.num_heads, spec.kv_num_heads, spec.head_dim, spec.chunk_size, int(spec.rope), spec.qk_norm_eps,
            spec.floor_scale, spec.attn_scale, native.FLOATS[SHORT[spec.compute]], native.KV_DTYPES[spec.kv_dtype],
        )  # fmt: skip
        batch, new = tensors.query.shape[:2]
        rows = 0 if tensors.cos is None else len(tensors.cos)
        shape = native.AttentionShape(batch, new, tensors.positions.shape[1], tensors.past_key.shape[2], rows)
        workspace = self._scratch(lambda: self.library.attention_workspace(attention, shape, self.multiprocessors))
        held = (
            tensors.query, tensors.key, tensors.value, tensors.past_key, tensors.past_value, tensors.positions,
            tensors.cos, tensors.sin, tensors.key_scale, tensors.value_scale, tensors.attention, tensors.past_key,
            tensors.past_value, workspace,
        )  # fmt: skip
        buffers = native.AttentionBuffers(*map(_address, held))
        return self._call(lambda stream: self.library.attention_enqueue(attention, shape, buffers, stream), held)

    def _scratch(self, size: Callable[[], int]) -> Any:
        try:
            count = size()
        except L4Error as error:
            raise Refused(str(error)) from None
        return self.torch.full((max(count, 1),), POISON, dtype=self.torch.uint8, device=self.device)

    def _call(self, enqueue: Callable[[int], None], held: tuple[Any, ...]) -> Call:
        def call() -> None:
            assert held  # the tensors whose addresses were taken live as long as the call
            try:
                enqueue(self.torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0)
            except L4Error as error:
                raise Refused(str(error)) from None

        return call


def _address(tensor: Any) -> int | None:
    return None if tensor is None else int(tensor.data_ptr())
