"""What the kernels of ONNX Runtime's execution providers can do: the lowering passes ask here, and hold no such rule.

The rows describe onnxruntime-gpu 1.31.1. Where a rule comes from is said next to it: a file of
github.com/microsoft/onnxruntime, read at the commit nearest to that release that could be had, and checked against the
messages and type names inside the release's own ``libonnxruntime_providers_cuda.so`` (ADR 0016 has the commands).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from l4convert.plugins.long_context_attention.definition import AttentionSpec


@dataclass(frozen=True)
class Provider:
    """Capabilities of one execution provider.

    Attributes:
        name: As a reader knows it; for messages.
        prepares_heads: GroupQueryAttention applies RoPE and QK norm itself (``do_rotary``, ``q_norm_weight``).
        far_tokens: After more tokens than this, GroupQueryAttention loses precision in calls of one token; None: never.
        fast_bias: GroupQueryAttention has a fast kernel that adds a mask to the scores. Without one, the kernel is
            taken only where plain causal attention is right.
        head_multiple, max_head_dim: Widths of a head that GroupQueryAttention takes.
        rotary_multiple: Of the head's width, for RoPE inside GroupQueryAttention.
        kv_dtypes: Quantized caches that GroupQueryAttention takes, with a scale for each channel.
        rounds_late: It attends to the first tokens of a cache as they come, and rounds them only to store them.
        qmoe_blocks: Quantization blocks along K that QMoE takes for INT4; empty: any.
        qmoe_multiple: Of the hidden size and the experts' width, for QMoE.
        qmoe_attributes: Attributes that QMoE needs beside those every provider gets.
        dequantizes_experts: Experts that QMoE does not take are dequantized for MoE, all of them at every call.
    """

    name: str
    prepares_heads: bool = False
    far_tokens: int | None = None
    fast_bias: bool = True
    head_multiple: int = 8
    max_head_dim: int | None = None
    rotary_multiple: int = 16
    kv_dtypes: frozenset[str] = frozenset()
    rounds_late: bool = False
    qmoe_blocks: frozenset[int] = frozenset()
    qmoe_multiple: int = 1
    qmoe_attributes: Mapping[str, Any] = field(default_factory=dict)
    dequantizes_experts: bool = True

    def refuses_attention(self, spec: AttentionSpec) -> str | None:
        """Why GroupQueryAttention cannot compute a layer; None where it can."""
        if spec.head_dim % self.head_multiple:
            return f"GroupQueryAttention takes heads of a multiple of {self.head_multiple}, not of {spec.head_dim}"
        if self.max_head_dim is not None and spec.head_dim > self.max_head_dim:
            return f"{self.name}: GroupQueryAttention takes heads of at most {self.max_head_dim}, not {spec.head_dim}"
        if spec.kv_dtype not in {"none", *self.kv_dtypes}:
            return f"{self.name}: GroupQueryAttention takes no caches of {spec.kv_dtype.upper()}"
        if spec.kv_dtype == "fp8" and spec.chunk_size and spec.kv_cache != "static":
            return f"{self.name}: no operator cuts the slots of a chunk out of an FP8 cache"
        return None

    def prepares(self, spec: AttentionSpec) -> bool:
        """Whether RoPE and QK norm of a layer can be left to GroupQueryAttention.

        The kernel norms, then rotates. The definition rotates, then norms: the same for a norm without weights
        (DESIGN section 4). A temperature would come between, so a layer with a norm and a temperature is prepared
        outside. So is one with a quantized cache: the documentation names RoPE and norm together with it in one place,
        and leaves them out in another.
        """
        if not self.prepares_heads or spec.kv_dtype != "none" or not (spec.rope or spec.qk_norm_eps):
            return False
        rotates = not spec.rope or spec.head_dim % self.rotary_multiple == 0
        return rotates and not (spec.qk_norm_eps and spec.attn_scale)

    def refuses_qmoe(self, block_size: int, hidden_size: int, intermediate_size: int) -> str | None:
        """Why QMoE cannot multiply with INT4 experts of these sizes; None where it can."""
        sizes = (hidden_size, intermediate_size)
        if self.qmoe_blocks and block_size not in self.qmoe_blocks:
            known = ", ".join(map(str, sorted(self.qmoe_blocks)))
            return f"{self.name}: QMoE takes blocks of {known}, not of {block_size}"
        if any(size % block_size for size in sizes):
            return f"QMoE takes experts whose sizes are multiples of the block, not {sizes[0]} x {sizes[1]}"
        if any(size % self.qmoe_multiple for size in sizes):
            return (
                f"{self.name}: QMoE takes sizes that are multiples of {self.qmoe_multiple}, not {sizes[0]} x {sizes[1]}"
            )
        return None


# kv_dtypes: measured (docs/adr/0017). FP8 caches are in the op's schema; "Not implemented" is what the kernel says.
# far_tokens: with one token a call, values are added up one after the other in float32 (core/mlas/lib/sgemm.cpp has a
# kernel of its own for products of one row); of ten million it loses 0.9 % (docs/guides/long-context.md).
CPU = Provider("CPU", far_tokens=1 << 20, kv_dtypes=frozenset({"int8", "int4"}))

# head_multiple, rotary_multiple: contrib_ops/cpu/bert/group_query_attention_helper.h, which both providers use.
# max_head_dim: contrib_ops/cuda/bert/group_query_attention_qkv.cuh, the largest instance of UnpackRoPEAppend.
# prepares_heads: contrib_ops/cuda/bert/group_query_attention.cc and docs/contrib_ops/cuda/gqa.md, section 3.
# fast_bias: the same file; a bias excludes XQA, cuDNN and flash attention and leaves the kernel that keeps all scores.
# kv_dtypes: gqa.md, section 4; the release has instances for int8, FP8 and packed INT4. With five query heads to a key
# head it dequantizes the cache and takes flash attention (XQA wants groups of 4, 8, 16 or 32). None of it was run.
# rounds_late: FlashAttentionAndQuantizeKV in group_query_attention_impl.cu, which serves first prompts.
# qmoe_multiple: contrib_ops/cuda/moe/moe_quantization.cc (the 64-element tile of interleaved weights).
# qmoe_blocks, weights_prepacked: docs/contrib_ops/cuda/moe_qmoe.md, sections 6.6 and 5.1. The default of
# weights_prepacked, -1, means weights in CUTLASS's order to this provider; 0 has it reorder plain ones when it loads.
# dequantizes_experts: a layer of Scout in bfloat16 is 4 GB, and would be written and read at every call.
CUDA = Provider(
    "CUDA",
    prepares_heads=True,
    fast_bias=False,
    max_head_dim=256,
    kv_dtypes=frozenset({"fp8", "int8", "int4"}),
    rounds_late=True,
    qmoe_blocks=frozenset({32, 64, 128}),
    qmoe_multiple=64,
    qmoe_attributes={"weights_prepacked": 0},
    dequantizes_experts=False,
)
