"""The same work through torch, beside our kernels: what it takes without them.

Experts: one after the other, dequantize and multiply; which tokens go to which is known before the clock starts, which
flatters torch. Stacked ``bmm`` would do the same products on copies padded to the fullest expert. FP8 multiplies in
FP8 (``torch._scaled_mm``, a scale a row and a column) where this torch and GPU can, else dequantizes, too.

Attention: ``scaled_dot_product_attention`` on prepared queries and a cache that has the new tokens already; rotation,
norm and writing, which our kernels do, are left out. A quantized cache is dequantized first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_tensors import AttentionTensors, MoeTensors, Weights, int4_codes
from roofline import Attention, Experts

Call = Callable[[], Any]


@dataclass(frozen=True)
class NaturalMatrix:
    """One expert's matrix as torch reads it best.

    Attributes:
        codes: INT4: uint8 [N, K/2], element 2j in the low half of byte j; FP8: float8_e4m3fn [N, K]; plain: [K, N].
        scale: INT4: [N, K/block, 1]; FP8: float32 [1, N]; plain: None.
    """

    codes: Any
    scale: Any

    def dense(self, torch: Any, compute: Any) -> Any:
        """[K, N] in the compute type."""
        if self.scale is None:
            return self.codes
        if self.codes.dtype == torch.uint8:
            codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).view(*self.scale.shape[:2], -1)
            return ((codes.to(torch.int8) - 8).to(compute) * self.scale).view(len(self.codes), -1).t()
        return (self.codes.to(compute) * self.scale.t().to(compute)).t()


def natural(torch: Any, experts: Experts, weights: Weights, expert: int) -> tuple[NaturalMatrix, NaturalMatrix]:
    """One expert's two matrices; INT4 and FP8 codes are copied, plain weights are not."""
    if experts.weights == "plain":
        return NaturalMatrix(weights.gate_up[expert], None), NaturalMatrix(weights.down[expert], None)
    parts = (
        (weights.gate_up[expert], weights.gate_up_scale[expert]),
        (weights.down[expert], weights.down_scale[expert]),
    )
    make = _natural_int4 if experts.weights == "int4" else _natural_fp8
    gate_up, down = (make(torch, words, scale) for words, scale in parts)
    return gate_up, down


def _natural_int4(torch: Any, words: Any, scale: Any) -> NaturalMatrix:
    codes = (int4_codes(torch, words) + 8).to(torch.uint8)  # 0..15
    return NaturalMatrix(codes[:, 0::2] | codes[:, 1::2] << 4, scale.t().contiguous()[:, :, None])


def _natural_fp8(torch: Any, words: Any, scale: Any) -> NaturalMatrix:
    return NaturalMatrix(words.view(torch.uint8).view(torch.float8_e4m3fn), scale.float())


class TorchMoe:
    """The routed experts in torch, for top-1 routing that is known beforehand."""

    def __init__(self, torch: Any, experts: Experts, weights: Weights, capable: bool = True) -> None:
        """``capable``: the GPU multiplies FP8 with a scale a row and a column."""
        self.torch, self.experts, self.weights = torch, experts, weights
        self.scaled = experts.weights == "fp8" and capable
        self._matrices: dict[int, tuple[NaturalMatrix, NaturalMatrix]] = {}

    def call(self, tensors: MoeTensors, chosen: np.ndarray) -> Call:
        """A call that gives y [T,H]."""
        torch, device = self.torch, tensors.x.device
        rows = [(int(e), torch.from_numpy(np.flatnonzero(chosen == e)).to(device)) for e in np.unique(chosen)]
        for expert, _ in rows:
            if expert not in self._matrices:
                self._matrices[expert] = natural(torch, self.experts, self.weights, expert)
        return lambda: self._run(tensors, rows)

    def _run(self, tensors: MoeTensors, groups: Sequence[tuple[int, Any]]) -> Any:
        torch, y = self.torch, tensors.x.new_empty(tensors.x.shape)
        for expert, rows in groups:
            gate_up, down = self._matrices[expert]
            score = torch.sigmoid(tensors.router_logits[rows, expert, None])
            gate, up = self._product((tensors.x[rows] * score).to(y.dtype), gate_up).chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
            y[rows] = self._product(hidden, down)
        return y

    def _product(self, rows: Any, matrix: NaturalMatrix) -> Any:
        torch = self.torch
        if not self.scaled:
            return rows @ matrix.dense(torch, rows.dtype)
        scale = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 448.0
        codes = (rows / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it
            codes, matrix.codes.t(), scale_a=scale, scale_b=matrix.scale, out_dtype=rows.dtype, use_fast_accum=True
        )


def can_scale(torch: Any, device: str) -> bool:
    """Whether FP8 products with a scale a row and a column run here: some GPUs and versions of torch refuse them."""
    try:
        codes = torch.ones(32, 32, device=device).to(torch.float8_e4m3fn)
        scale = torch.ones(32, 1, device=device)
        torch._scaled_mm(  # noqa: SLF001 - likewise
            codes, codes.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    except (RuntimeError, ValueError):
        return False
    return True


class TorchAttention:
    """The attention of one call in torch: every sequence has as many tokens as the others."""

    def __init__(self, torch: Any, layer: Attention, tensors: AttentionTensors, new: int, context: int) -> None:
        self.torch, self.layer, self.tensors = torch, layer, tensors
        self.new, self.past = new, layer.past(new, context)
        # Whole chunks in one call are a batch of chunks.
        self.chunks = new // layer.chunk_size if layer.chunk_size and new > layer.chunk_size else 1
        # Of several chunks the cache holds the last one only; its codes stand in for those of the others.
        self.comparable = self.chunks == 1 or layer.kv == "none"
        self.query, self.keys, self.values = self._prepared(context)

    def call(self) -> Any:
        """attention [B,S,Hq*D]."""
        torch, layer = self.torch, self.layer
        keys, values = (self._dequantized(part) for part in ((self.keys, self.tensors.key_scale),
                                                             (self.values, self.tensors.value_scale)))  # fmt: skip
        attend, options = torch.nn.functional.scaled_dot_product_attention, {"enable_gqa": True}
        if self.new > 1 and self.past:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"] = causal_lower_right(self.query.shape[2], keys.shape[2])
        elif self.new > 1:
            options["is_causal"] = True
        out = attend(self.query, keys, values, **options)
        return out.transpose(1, 2).reshape(-1, self.new, layer.num_heads * layer.head_dim)

    def _dequantized(self, part: tuple[Any, Any]) -> Any:
        cache, scale = part
        return cache if scale is None else cache.to(self.query.dtype) * scale.to(self.query.dtype)

    def _prepared(self, context: int) -> tuple[Any, Any, Any]:
        """Queries [B,Hq,S,D], and keys and values [B,Hk,L,D]: views of the cache where it holds all that is seen."""
        tensors, layer = self.tensors, self.layer
        query, key, value = (_heads(part, layer.head_dim) for part in (tensors.query, tensors.key, tensors.value))
        query = self._split(prepare(self.torch, layer, query, context - self.new, self.tensors, is_query=True))
        if self.chunks > 1 and layer.kv == "none":
            key = prepare(self.torch, layer, key, context - self.new, self.tensors)
            return query, self._split(key), self._split(value)
        seen = min(self.past + self.new, tensors.past_key.shape[2])
        keys, values = (cache[:, :, :seen] for cache in (tensors.past_key, tensors.past_value))
        if self.chunks > 1:
            keys, values = (part.repeat(self.chunks, 1, 1, 1) for part in (keys, values))
        return query, keys, values

    def _split(self, heads: Any) -> Any:
        """[1,H,S,D] -> [chunks,H,C,D]."""
        if self.chunks == 1:
            return heads
        return heads.unflatten(2, (self.chunks, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _heads(projected: Any, width: int) -> Any:
    """[B,S,H*D] -> [B,H,S,D]."""
    return projected.unflatten(2, (-1, width)).transpose(1, 2)


def prepare(
    torch: Any, layer: Attention, heads: Any, first: int, tensors: AttentionTensors, is_query: bool = False
) -> Any:
    """Rotation and norm of a chunked layer, temperature of a global one's queries, as Scout has them.

    Args:
        heads: [B,H,S,D], tokens at positions ``first`` and on.
    """
    numbers = heads.float()
    positions = torch.arange(first, first + heads.shape[2], device=heads.device)
    if layer.chunk_size:
        cos, sin = (table[positions % layer.chunk_size] for table in (tensors.cos, tensors.sin))
        even, odd = numbers[..., 0::2], numbers[..., 1::2]
        numbers = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        numbers = numbers * torch.rsqrt(numbers.square().mean(-1, keepdim=True) + EPS)
    elif is_query:
        numbers = numbers * (1 + ATTN_SCALE * torch.log1p(torch.floor((positions + 1) / FLOOR_SCALE)))[:, None]
    return numbers.to(heads.dtype)


# Of Scout's configuration (l4convert/checkpoint/presets.py).
EPS, FLOOR_SCALE, ATTN_SCALE = 1e-5, 8192.0, 0.1
