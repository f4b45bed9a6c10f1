"""Random inputs of the plugins' kernels as torch tensors, on any device, and what their weights and caches stand for.

Weights are random codes: what they decode to is worked out here from the layout's description (plugins/moe/README.md),
not with the code that packs real weights, so that the two check each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from roofline import Attention, Experts

from l4convert.plugins.moe.layout import GROUP, K_ORDER

# E4M3 bytes without their highest exponent bit: no NaN, magnitudes below 2, their root mean square about 0.5.
WEIGHT_BITS, FP8_RMS = 0xBF, 0.5
# E4M3 bytes without their lowest bit: no NaN, magnitudes up to 448.
CACHE_BITS = 0xFE
INT4_RMS = 4.6  # of -8..7 with equal odds
LARGEST_KEY = 4.0  # what the largest code of a quantized cache stands for, about


@dataclass(frozen=True)
class Weights:
    """Experts' weights as the kernels take them.

    Attributes:
        gate_up, down: INT4: int32 words [E, N, K/8]; FP8: int64 words [E, N, K/8]; plain: [E, K, N].
        gate_up_scale, down_scale: INT4: [E, K/block, N]; FP8: [E, 1, N], of the compute type; plain: None.
    """

    gate_up: Any
    gate_up_scale: Any
    down: Any
    down_scale: Any


@dataclass(frozen=True)
class MoeTensors:
    """One call: x [T,H], router_logits float32 [T,E], weights, and y [T,H] to be written."""

    x: Any
    router_logits: Any
    weights: Weights
    y: Any


@dataclass(frozen=True)
class AttentionTensors:
    """One call, shapes and names as in plugins/long_context_attention/definition.py; past and present are one buffer.

    ``cos`` and ``sin`` are None on layers without RoPE, the scales where the cache is not quantized.
    """

    query: Any
    key: Any
    value: Any
    past_key: Any
    past_value: Any
    positions: Any
    cos: Any
    sin: Any
    key_scale: Any
    value_scale: Any
    attention: Any


class Maker:
    """Makes tensors of a compute type on a device, from torch's own random state."""

    def __init__(self, torch: Any, device: str, compute: str = "bfloat16") -> None:
        self.torch, self.device, self.compute = torch, device, getattr(torch, compute)

    def normal(self, *shape: int) -> Any:
        return self.torch.empty(*shape, dtype=self.compute, device=self.device).normal_()

    def random_bytes(self, *shape: int) -> Any:
        return self.torch.empty(*shape, dtype=self.torch.uint8, device=self.device).random_(0, 256)

    def weights(self, experts: Experts) -> Weights:
        """Random weights whose products keep the size of what they are multiplied with."""
        hidden, width = experts.hidden_size, experts.intermediate_size
        gate_up, gate_up_scale = self._matrix(experts, hidden, 2 * width)
        down, down_scale = self._matrix(experts, width, hidden)
        return Weights(gate_up, gate_up_scale, down, down_scale)

    def _matrix(self, experts: Experts, inner: int, columns: int) -> tuple[Any, Any]:
        count, torch = experts.num_experts, self.torch
        if experts.weights == "plain":
            return self.normal(count, inner, columns).mul_(inner**-0.5), None
        if experts.weights == "int4":
            words = self.random_bytes(count, columns, inner // 2).view(torch.int32)
            return words, self._scales(INT4_RMS * inner**0.5, count, inner // experts.block, columns)
        words = self.random_bytes(count, columns, inner).bitwise_and_(WEIGHT_BITS).view(torch.int64)
        return words, self._scales(FP8_RMS * inner**0.5, count, 1, columns)

    def _scales(self, divisor: float, *shape: int) -> Any:
        scales = self.torch.empty(*shape, dtype=self.torch.float32, device=self.device)
        return scales.uniform_(0.5 / divisor, 1.5 / divisor).to(self.compute)

    def routed(self, experts: Experts, weights: Weights, chosen: np.ndarray) -> MoeTensors:
        """Tokens that choose the given experts, int [T] or [T,K]; logits differ from each other in every row."""
        torch, tokens = self.torch, len(chosen)
        logits = torch.empty(tokens, experts.num_experts, device=self.device).uniform_(-3.0, -1.0)
        wanted = torch.from_numpy(chosen.reshape(tokens, -1).astype(np.int64)).to(self.device)
        logits.scatter_(1, wanted, torch.empty(wanted.shape, device=self.device).uniform_(-0.5, 2.0))
        x = self.normal(tokens, experts.hidden_size)
        return MoeTensors(x, logits, weights, self.poisoned(tokens, experts.hidden_size))

    def poisoned(self, *shape: int) -> Any:
        """An output that is NaN wherever nothing is written."""
        return self.torch.full(shape, float("nan"), dtype=self.compute, device=self.device)

    def attended(self, layer: Attention, positions: np.ndarray, new: int, slots: int) -> AttentionTensors:
        """A call of ``new`` tokens on a full buffer of ``slots`` slots; positions int64 [B,T], -1 is padding."""
        batch, heads, width = len(positions), layer.num_heads, layer.head_dim
        kv = layer.kv_num_heads
        cos, sin = self.tables(layer.chunk_size, width) if layer.chunk_size else (None, None)
        past = [self._cache(layer, batch, slots) for _ in range(2)]
        scales = [None, None] if layer.kv == "none" else [self._cache_scales(layer) for _ in range(2)]
        new_tokens = [self.normal(batch, new, count * width) for count in (heads, kv, kv)]
        columns = self.torch.from_numpy(positions).to(self.device)
        output = self.poisoned(batch, new, heads * width)
        return AttentionTensors(*new_tokens, *past, columns, cos, sin, *scales, output)

    def tables(self, rows: int, width: int, base: float = 500_000.0) -> tuple[Any, Any]:
        """Cosines and sines float32 [rows, D/2] (RoFormer, arXiv:2104.09864, section 3.2.2)."""
        angles = np.arange(rows)[:, None] * base ** (-np.arange(0, width, 2) / width)
        tables = (self.torch.from_numpy(part(angles).astype(np.float32)) for part in (np.cos, np.sin))
        cos, sin = (table.to(self.device) for table in tables)
        return cos, sin

    def _cache(self, layer: Attention, batch: int, slots: int) -> Any:
        """Keys or values of a cache [B,Hk,M,D] as they are stored; random codes."""
        shape, torch = (batch, layer.kv_num_heads, slots, layer.head_dim), self.torch
        if layer.kv == "none":
            return self.normal(*shape)
        if layer.kv == "int8":
            return torch.empty(shape, dtype=torch.int8, device=self.device).random_(-96, 97)
        return self.random_bytes(*shape).bitwise_and_(CACHE_BITS).view(torch.float8_e4m3fn)

    def _cache_scales(self, layer: Attention) -> Any:
        """Float32 [1,Hk,1,D], another one for every channel."""
        largest = {"int8": 127.0, "fp8": 448.0}[layer.kv]
        scales = self.torch.empty(1, layer.kv_num_heads, 1, layer.head_dim, device=self.device)
        return scales.uniform_(0.75 * LARGEST_KEY / largest, 1.25 * LARGEST_KEY / largest)


def dense(torch: Any, experts: Experts, weights: Weights, expert: int) -> tuple[Any, Any]:
    """One expert's matrices [H, 2I] and [I, H] in the compute type: ``round(code * scale)``."""
    parts = ((weights.gate_up, weights.gate_up_scale), (weights.down, weights.down_scale))
    if experts.weights == "plain":
        return weights.gate_up[expert], weights.down[expert]
    decode = int4_codes if experts.weights == "int4" else fp8_codes
    gate_up, down = (_scaled(torch, decode(torch, words[expert]), scale[expert]) for words, scale in parts)
    return gate_up, down


def _scaled(torch: Any, codes: Any, scale: Any) -> Any:
    """Codes float32 [N, K] and their scales [K/block, N] -> [K, N] in the scales' type."""
    block = codes.shape[1] // scale.shape[0]
    return (codes.t() * scale.float().repeat_interleave(block, dim=0)).to(scale.dtype)


def int4_codes(torch: Any, words: Any) -> Any:
    """Words int32 [N, K/8] -> codes float32 [N, K], -8..7."""
    pairs = words.view(torch.uint8)
    slots = torch.stack((pairs & 15, pairs >> 4), dim=-1).reshape(len(words), -1, GROUP)
    order = torch.tensor(K_ORDER, device=words.device)
    codes = torch.empty_like(slots)
    codes[:, :, order] = slots
    return ((codes.reshape(len(words), -1) ^ 8).float()) - 8


def fp8_codes(torch: Any, words: Any) -> Any:
    """Words int64 [N, K/8] -> numbers float32 [N, K]."""
    return words.view(torch.uint8).view(torch.float8_e4m3fn).float()
