"""Which device buffers an engine needs, what its tensors are bound to, and the shapes of a call: all of it data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import InputError
from l4convert.quantization.kv import KV_FORMATS
from l4convert.runtime.caches import CacheNames
from l4convert.runtime.device import Shape
from l4convert.runtime.engines import Engine, EngineFile, Profile, Tensor

_REBUILD = "Run `l4convert build` again."

IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
HIDDEN, NEXT = "hidden_states", "hidden_states.next"

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}
"""Element types that an engine's inputs and outputs may have, by their names in the manifest."""
QUANTIZED: Mapping[str, np.dtype[Any]] = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}
"""Those that caches may have besides; bytes are pairs of INT4 codes."""


@dataclass(frozen=True)
class Layout:
    """How an engine is bound.

    Attributes:
        buffers: Name -> bytes of every device buffer, caches apart.
        caches: Name of a cache's input -> bytes of its buffer, at the engine's largest batch.
        bindings: Per plan, tensor name -> name of the buffer. Past and present of a cache have one.
    """

    buffers: Mapping[str, int]
    caches: Mapping[str, int]
    bindings: tuple[Mapping[str, str], ...]

    @property
    def nbytes(self) -> int:
        """Device memory of all of them."""
        return sum(self.buffers.values()) + sum(self.caches.values())


def plan_layout(engine: Engine, config: DecoderConfig) -> Layout:
    """Lay out an engine's buffers.

    Hidden states go from plan to plan through two buffers in turn; the token ids and the mask are one buffer for all.

    Raises:
        InputError: A plan does not have the inputs and outputs of the decoder's contract (DESIGN section 5).
    """
    names = CacheNames.of(config)
    tokens = longest_call(engine.profiles)
    sizes: dict[str, int] = {}
    caches: dict[str, int] = {}
    bindings = []
    for index, plan in enumerate(engine.files):
        own = _own_caches(names, plan)
        _check_tensors(engine, plan, own, names, config)
        hidden = {HIDDEN: f"{HIDDEN}.{index % 2}", NEXT: f"{HIDDEN}.{(index + 1) % 2}"}
        binding = {name: own.get(name, hidden.get(name, name)) for name in (*plan.inputs, *plan.outputs)}
        for tensor in (*plan.inputs.values(), *plan.outputs.values()):
            shape = concrete(tensor, engine.max_batch, tokens, engine.max_context)
            where = caches if binding[tensor.name] in names.past else sizes
            where[binding[tensor.name]] = prod(shape) * {**DTYPES, **QUANTIZED}[tensor.dtype].itemsize
        bindings.append(binding)
    return Layout(sizes, caches, tuple(bindings))


def longest_call(profiles: Sequence[Profile]) -> int:
    """The most new tokens a row that one call can take."""
    return max(profile.most for profile in profiles)


def choose_profile(profiles: Sequence[Profile], tokens: int) -> int:
    """Index of the narrowest profile that takes a call of so many new tokens a row.

    Raises:
        ValueError: None does; the caller splits calls by :func:`longest_call`.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.least <= tokens <= profile.most]
    if not fitting:
        raise ValueError(f"no profile for {tokens} tokens")
    return min(fitting, key=lambda index: profiles[index].most)


def concrete(tensor: Tensor, batch: int, tokens: int, total: int) -> Shape:
    """A tensor's shape in a call.

    The first axis is the batch; of the open axes after it the mask's is ``total``, every other one is ``tokens``.
    """
    rest = total if tensor.name == MASK else tokens
    return tuple(size if size >= 0 else batch if axis == 0 else rest for axis, size in enumerate(tensor.shape))


def _own_caches(names: CacheNames, plan: EngineFile) -> dict[str, str]:
    """Past and present name of every cache of the plan's layers -> the name of its buffer (the past one)."""
    pairs = list(zip(names.past, names.present, strict=True))[2 * plan.first : 2 * plan.stop]
    return {name: past for past, present in pairs for name in (past, present)}


def _check_tensors(
    engine: Engine, plan: EngineFile, own: Mapping[str, str], names: CacheNames, config: DecoderConfig
) -> None:
    first, last = plan is engine.files[0], plan is engine.files[-1]
    inputs = {IDS if first else HIDDEN, MASK, *(name for name in own if name in names.past)}
    outputs = {LOGITS if last else NEXT, *(name for name in own if name in names.present)}
    for kind, found, expected in (("input", plan.inputs, inputs), ("output", plan.outputs, outputs)):
        for problem, wrong in (("misses", expected - found.keys()), ("has an unexpected", found.keys() - expected)):
            if wrong:
                raise InputError(f"{plan.path}: the engine {problem} {kind} {min(wrong)}", _REBUILD)
    for tensor in (*plan.inputs.values(), *plan.outputs.values()):
        if problem := "; ".join(_tensor_problems(tensor, own, names, config)):
            raise InputError(f"{plan.path}: tensor {tensor.name} {problem}", _REBUILD)


def _tensor_problems(tensor: Tensor, own: Mapping[str, str], names: CacheNames, config: DecoderConfig) -> Iterator[str]:
    known = (*DTYPES, *QUANTIZED) if tensor.name in own else tuple(DTYPES)
    if tensor.dtype not in known:
        yield f"is of type {tensor.dtype}, expected one of {', '.join(known)}"
    ranks = {IDS: 2, MASK: 2, LOGITS: 3, HIDDEN: 3, NEXT: 3}
    if len(tensor.shape) != ranks.get(tensor.name, 4):
        yield f"has shape {list(tensor.shape)}"
    elif tensor.name in own:
        _, heads, slots, width = tensor.shape
        expected = names.head_dim // (KV_FORMATS["int4"].packing if tensor.dtype == "uint8" else 1)
        if (heads, width) != (names.heads, expected) or slots < 1:
            yield f"has shape {list(tensor.shape)}, expected {names.heads} heads of {expected} in fixed slots"
    elif tensor.name == LOGITS and tensor.shape[2] != config.vocab_size:
        yield f"has shape {list(tensor.shape)}, the vocabulary has {config.vocab_size} tokens"
