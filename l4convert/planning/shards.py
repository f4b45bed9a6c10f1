"""How the weights of a model are divided among GPUs by tensor parallelism, exactly, tensor by tensor.

The division is Megatron-LM's (Shoeybi et al. 2019, section 3): projections into heads or into the hidden width of an
MLP are cut by their outputs, those back into the residual stream by their inputs, so that a block needs one sum over
the GPUs. Every GPU has a part of every expert. Embedding and head are cut by the vocabulary. Norms, routers and rotary
tables are on every GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import UsageError
from l4convert.planning.figures import Figure
from l4convert.planning.tensors import SCALES, TensorPlan, kind_of_name

#: By what a tensor is cut; "nothing": every GPU has the whole of it.
Cut = Literal["heads", "key/value heads", "width", "vocabulary", "nothing"]
Group = Literal["experts", "embedding", "other"]
#: How routed experts are stored: in 16 bits or more, in words of codes, or quantized for a DequantizeLinear.
Stored = Literal["plain", "int4", "fp8", "dequantized"]
_WORDS: Mapping[str, Stored] = {"INT32": "int4", "INT64": "fp8"}

_KEYS_VALUES = re.compile(r"\.self_attn\.[kv]_proj\.")
# These take the cut axis as their input. An FP8 scale belongs to an output, so it is the same on every GPU.
_BACK = re.compile(r"(down|o)_proj")
_CUTS: Mapping[str, Cut] = {
    "experts": "width",
    "shared expert": "width",
    "dense MLP": "width",
    "embedding, head": "vocabulary",
}


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights.

    Attributes:
        parts: By what they are for and what they are cut by.
        kv_heads: Key/value heads of the model.
        half: Of matrices in 16 bits, the embedding apart, from which rows are taken as they are.
        experts: How routed experts are stored; where layers differ, the form that takes the most memory in use.
    """

    parts: Mapping[tuple[Group, Cut], int]
    kv_heads: int
    half: int = 0
    experts: Stored = "plain"

    @property
    def bytes(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    def rank(self, tensor_parallel: int, group: Group | None = None) -> float:
        """Bytes on one of ``tensor_parallel`` GPUs, of all weights or of a group."""
        return sum(
            nbytes / self._ways(cut, tensor_parallel)
            for (of, cut), nbytes in self.parts.items()
            if group is None or of == group
        )

    def _ways(self, cut: Cut, tensor_parallel: int) -> int:
        if cut == "nothing":
            return 1
        return min(tensor_parallel, self.kv_heads) if cut == "key/value heads" else tensor_parallel

    def figure(self, tensor_parallel: int) -> Figure:
        """The weights on one GPU."""
        cuts: Counter[str] = Counter()
        for (_, cut), nbytes in self.parts.items():
            cuts[cut] += nbytes
        if tensor_parallel == 1:
            arithmetic = f"{self.bytes:,}: every tensor of the plan"
        else:
            arithmetic = " + ".join(
                f"{nbytes:,} / {self._ways(cut, tensor_parallel)} (by {cut})"
                if cut != "nothing"
                else f"{nbytes:,} (on every GPU)"
                for cut, nbytes in _in_order(cuts)
            )
        return Figure("weights", self.rank(tensor_parallel), "B", arithmetic, "the planned tensors, exact")


def weights_of(table: Iterable[TensorPlan], config: DecoderConfig) -> Weights:
    """Sort the tensors of a plan."""
    parts: Counter[tuple[Group, Cut]] = Counter()
    half = 0
    forms: set[Stored] = {"plain"}
    for row in table:
        kind = kind_of_name(row.name) if row.kind == SCALES else row.kind
        group: Group = "experts" if kind == "experts" else "other"
        if row.name.startswith("model.embed_tokens") and not config.tie_word_embeddings:
            group = "embedding"
        parts[group, _cut(row, kind)] += row.bytes
        if row.dtype in ("BFLOAT16", "FLOAT16") and group != "embedding":
            half += row.bytes
        if row.kind == "experts" and row.scheme != "none":
            forms.add(_WORDS.get(row.dtype, "dequantized"))
    worst = max(forms, key=get_args(Stored).index)
    return Weights(dict(parts), config.num_key_value_heads, half, worst)


def _cut(row: TensorPlan, kind: str) -> Cut:
    if _BACK.search(row.name) and (row.name.endswith(".bias") or (row.kind == SCALES and row.scheme == "fp8")):
        return "nothing"
    if kind == "attention":
        return "key/value heads" if _KEYS_VALUES.search(row.name) else "heads"
    return _CUTS.get(kind, "nothing")


def degrees(config: DecoderConfig, block_size: int | None = None) -> tuple[int, ...]:
    """Degrees of tensor parallelism that divide key/value heads and everything else that is cut.

    Args:
        config: The model.
        block_size: Of INT4 weights: what is cut by its inputs is cut between blocks.
    """
    return tuple(n for n in range(1, config.num_key_value_heads + 1) if not _obstacle(config, block_size, n))


def check_degree(config: DecoderConfig, block_size: int | None, wanted: int) -> None:
    """Refuse a degree that does not divide the model.

    More GPUs than key/value heads are possible where each head is on equally many: its keys and values then are, too.

    Raises:
        UsageError: It does not; names what it does not divide, and the degrees that are possible.
    """
    obstacle = _obstacle(config, block_size, wanted)
    if obstacle:
        possible = ", ".join(map(str, degrees(config, block_size)))
        raise UsageError(f"tensor parallelism of {wanted} does not divide {obstacle}", f"possible: {possible}")


def _obstacle(config: DecoderConfig, block_size: int | None, n: int) -> str | None:
    if n == 1:
        return None
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % n:
        return f"the {heads} query heads"
    if kv_heads % n and n % kv_heads:
        return f"the {kv_heads} key/value heads"
    block = block_size or 1
    widths = {heads * config.head_dim}
    if any(not layer.moe for layer in config.layers):
        widths.add(config.intermediate_size_mlp)
    if any(layer.moe for layer in config.layers):
        widths.add(config.intermediate_size)
    for width in sorted(widths):
        if width % (n * block):
            return f"a width of {width}" + (f" between INT4 blocks of {block}" if block > 1 else "")
    return None  # a vocabulary that is not divisible is padded


def _in_order(cuts: Mapping[str, int]) -> list[tuple[Cut, int]]:
    order: tuple[Cut, ...] = ("width", "heads", "key/value heads", "vocabulary", "nothing")
    return [(cut, cuts[cut]) for cut in order if cuts.get(cut)]
