"""One decode step of Llama 4 in float64 NumPy, on caches of any length; nothing of l4convert.

Written from transformers' ``modeling_llama4.py`` and ``modeling_rope_utils.py``. Rotary angles are those of absolute
positions: position times frequency, in float64. The caches hold what comes before the rotation, and are read a block
at a time, with the softmax of all blocks put together as in arXiv:2112.05682.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 20  # slots that are in float64 at once


@dataclass(frozen=True)
class Past:
    """What a layer remembers.

    Attributes:
        keys: [Hk, N, D] of the last N tokens before the new one, before rotation (but normed, where the model norms).
        values: [Hk, N, D].
    """

    keys: np.ndarray
    values: np.ndarray


@dataclass
class Model:
    """A checkpoint in Hugging Face's layout.

    Attributes:
        config: Of the text decoder, as transformers reads it.
        weights: Name -> array; each is made float64 when it is used.
        mass: Filled by a step: for each global layer, the share of the attention in each block of its past, averaged
            over heads.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    mass: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Model:
        """Read the weights with PyTorch, which knows BF16."""
        from safetensors.torch import load_file
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path).to_dict()
        tensors = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
        return cls(config, {name: tensor.float().numpy() for name, tensor in tensors.items()})

    def step(self, token: int, position: int, past: Sequence[Past]) -> np.ndarray:
        """Logits [vocabulary] of the token at ``position``, given what each layer remembers."""
        x = self.weights["model.embed_tokens.weight"][token].astype(np.float64)
        for layer, memory in enumerate(past):
            name = f"model.layers.{layer}"
            x = x + self._attention(layer, self._norm(x, f"{name}.input_layernorm.weight"), position, memory)
            hidden = self._norm(x, f"{name}.post_attention_layernorm.weight")
            moe = layer in self.config["moe_layers"]
            x = x + (self._experts if moe else self._mlp)(hidden, f"{name}.feed_forward")
        x = self._norm(x, "model.norm.weight")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self._linear(x, head)

    def angles(self, positions: np.ndarray) -> np.ndarray:
        """Rotary angles [N, D/2] of positions [N]."""
        rope, half = self.config["rope_parameters"], np.arange(0, self.config["head_dim"], 2)
        frequency = rope["rope_theta"] ** -(half / self.config["head_dim"])
        if rope["rope_type"] == "llama3":
            length, low, high = (
                rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            turns = length * frequency / (2 * math.pi)
            # 1: as it is; 0: slowed by the factor; between the two where both factors leave room.
            keep = (turns >= low).astype(np.float64) if low == high else np.clip((turns - low) / (high - low), 0, 1)
            frequency = frequency * (keep + (1 - keep) / rope["factor"])
        return positions[:, None].astype(np.float64) * frequency

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Turn the pairs (0, 1), (2, 3), ... of [H, N, D] by the angles of positions [N]."""
        turned = x[..., 0::2] + 1j * x[..., 1::2]
        turned = turned * np.exp(1j * self.angles(positions))
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def unit(self, x: np.ndarray) -> np.ndarray:
        """RMS norm of [..., D], without a weight."""
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])

    def _attention(self, layer: int, x: np.ndarray, position: int, past: Past) -> np.ndarray:
        config, name = self.config, f"model.layers.{layer}.self_attn"
        rotated = bool(config["no_rope_layers"][layer])
        query, key, value = (
            self._linear(x, f"{name}.{part}_proj").reshape(-1, 1, config["head_dim"]) for part in "qkv"
        )
        if rotated:
            query, key = (self.rotate(part, np.array([position])) for part in (query, key))
            if config["use_qk_norm"]:
                query, key = self.unit(query), self.unit(key)
        elif config["attn_temperature_tuning"]:
            query = query * (np.log1p(np.floor((position + 1) / config["floor_scale"])) * config["attn_scale"] + 1)
        count = past.keys.shape[1]
        blocks = [(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK)]
        first = position - count

        def memory(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
            keys = past.keys[:, begin:end].astype(np.float64)
            turned = self.rotate(keys, np.arange(first + begin, first + end)) if rotated else keys
            return turned, past.values[:, begin:end].astype(np.float64)

        parts = [_attend(query, *memory(*block)) for block in blocks] + [_attend(query, key, value)]
        highest = np.max([part[0] for part in parts], axis=0)
        weights = np.stack([total * np.exp(top - highest) for top, total, _ in parts])
        output = sum(np.exp(top - highest)[..., None] * summed for top, _, summed in parts)
        if not rotated:
            self.mass[layer] = (weights / weights.sum(axis=0)).mean(axis=(1, 2))
        return self._linear((output / weights.sum(axis=0)[..., None]).reshape(-1), f"{name}.o_proj")

    def _experts(self, x: np.ndarray, name: str) -> np.ndarray:
        logits = self._linear(x, f"{name}.router")
        total = self._mlp(x, f"{name}.shared_expert")
        for expert in np.argsort(-logits)[: self.config["num_experts_per_tok"]]:
            scaled = x / (1 + np.exp(-logits[expert]))
            both = scaled @ self.weights[f"{name}.experts.gate_up_proj"][expert].astype(np.float64)
            gate, up = np.split(both, 2)
            total = total + (up * _silu(gate)) @ self.weights[f"{name}.experts.down_proj"][expert].astype(np.float64)
        return total

    def _mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        gate, up = (self._linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self._linear(_silu(gate) * up, f"{name}.down_proj")

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.unit(x) * self.weights[name]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        result: np.ndarray = self.weights[f"{name}.weight"].astype(np.float64) @ x
        return result


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One block: highest score, sum of exp(score - highest) and the values weighted with it, for each head.

    Query [Hq, 1, D]; keys and values [Hk, N, D]. Returns [Hk, Hq/Hk], the same, and [Hk, Hq/Hk, D].
    """
    kv_heads, _, width = keys.shape
    scores = query.reshape(kv_heads, -1, width) @ keys.transpose(0, 2, 1) * width**-0.5
    highest = scores.max(axis=-1)
    weights = np.exp(scores - highest[..., None])
    return highest, weights.sum(axis=-1), weights @ values
