"""LoRA adapters, as the PEFT library saves them, merged into a checkpoint's weights as these are read."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from l4convert.checkpoint.adapters.applied import AppliedAdapter
from l4convert.checkpoint.adapters.config import MERGE_HINT
from l4convert.checkpoint.adapters.contents import Adapter, is_adapter, open_adapter
from l4convert.checkpoint.adapters.merged import Merged, Update, is_merged
from l4convert.checkpoint.adapters.targets import EMBEDDINGS, HEAD, Base, Scales, Targets
from l4convert.checkpoint.base import Checkpoint
from l4convert.checkpoint.combiners import Reshaped, cast
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import Layout, Shape, expected_tensors, find_experts, find_layout
from l4convert.checkpoint.prequantized import quantized_parts
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

__all__ = [
    "Adapter",
    "AppliedAdapter",
    "Merged",
    "adapter_layout",
    "adapter_scales",
    "is_adapter",
    "is_merged",
    "merge_adapters",
    "open_adapter",
]


N = TypeVar("N", int, float)


def merge_adapters(checkpoint: Checkpoint, folders: Sequence[Path]) -> Checkpoint:
    """A checkpoint with adapters merged, one after the other; no weight is read.

    Args:
        checkpoint: The model.
        folders: Of adapters, in their order.

    Returns:
        The same checkpoint with other tensors; it remembers the adapters, and their files count as its own.

    Raises:
        InputError: An adapter cannot be used, or was trained on another model.
    """
    for folder in folders:
        checkpoint = _merged(checkpoint, open_adapter(folder))
    return checkpoint


def adapter_layout(adapter: Adapter) -> Layout:
    """How an adapter names the text decoder's modules."""
    return find_layout([*(place.module for place in adapter.pairs), *adapter.whole])


def adapter_scales(adapter: Adapter) -> Iterator[tuple[str, int, float]]:
    """What each pair of an adapter changes, by its name in training, with its rank and scale.

    Raises:
        InputError: A pattern of the config is not usable.
    """
    scales = Scales(adapter.config)
    for place in adapter.pairs:
        name = scales.name_of(place)
        yield name, *scales.find(name)


def _merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    shapes = {name: tensor.dims for name, tensor in checkpoint.tensors.items()}
    stacked = expected_tensors(checkpoint.config, "stacked")
    base = Base(shapes, stacked, adapter_layout(adapter), checkpoint.experts == "unfused")
    _require_untied(checkpoint, adapter, base.layout)
    tensors = dict(checkpoint.tensors)
    whole = dict(_whole(adapter, base))
    # As computed ones: they are not in a file of the checkpoint, which an artifact could share.
    tensors |= {name: Reshaped(cast(part, tensors[name].dtype), part.dims) for name, part in whole.items()}
    targets = Targets(adapter, base)
    updates: dict[str, list[Update]] = {}
    for place in adapter.pairs:
        for name, update in targets.updates(place):
            updates.setdefault(name, []).append(update)
    _require_complete(adapter, base, updates)
    tensors |= {name: _with_updates(tensors[name], those) for name, those in updates.items()}
    applied = AppliedAdapter(
        path=adapter.path,
        files=adapter.files,
        base=adapter.config.base,
        ranks=_counts(update.left.matrix[2] for those in updates.values() for update in those),
        scales=_counts(update.scale for those in updates.values() for update in those),
        merged=tuple(updates),
        replaced=tuple(name for name in whole if name not in updates),
        dequantized=tuple(name for name in {**whole, **updates} if any(quantized_parts(checkpoint.tensors[name]))),
        vision=adapter.vision,
    )
    return dataclasses.replace(checkpoint, tensors=tensors, adapters=(*checkpoint.adapters, applied))


def _with_updates(tensor: LazyTensor, updates: list[Update]) -> LazyTensor:
    """Updates of several adapters are summed before the one rounding."""
    if isinstance(tensor, Merged):
        return Merged(tensor.base, [*tensor.updates, *updates])
    return Merged(tensor, updates)


def _counts(values: Iterable[N]) -> Mapping[N, int]:
    return dict(sorted(Counter(values).items()))


def _require_untied(checkpoint: Checkpoint, adapter: Adapter, layout: Layout) -> None:
    """Changing the embeddings or the output layer unties one from the other, which is another model."""
    if not checkpoint.config.tie_word_embeddings:
        return
    changed = [*(f"{place.module}.weight" for place in adapter.pairs), *adapter.whole]
    names = {layout.canonical(name) for name in changed}
    for name, other in ((HEAD, "embed_tokens"), (EMBEDDINGS, "lm_head")):
        if name in names:
            module = name.split(".")[-2]
            raise InputError(
                f"{show(adapter.files[-1])}: adapts {module}, which shares {other}'s weights in this model", MERGE_HINT
            )


def _whole(adapter: Adapter, base: Base) -> Iterable[tuple[str, LazyTensor]]:
    """Weights that were trained whole, by canonical name."""
    for stored, tensor in adapter.whole.items():
        where = f"{show(tensor.file)}: tensor '{show(tensor.key)}'"
        name = base.layout.canonical(stored)
        if name is None or name not in base.shapes:
            raise InputError(f"{where} is not one that this model has", _other_experts(name, base))
        # peft saves embeddings whole beside their own LoRA, and where it believes that the vocabulary was changed.
        if not _is_saved(stored, adapter) and name not in (EMBEDDINGS, HEAD):
            raise InputError(f"{where} is a whole weight that modules_to_save does not list", MERGE_HINT)
        if tensor.dims != base.shapes[name]:
            hint = "the adapter is another model's, or its vocabulary was resized: then merge it with peft first"
            raise InputError(f"{where} has shape {list(tensor.dims)}, the model's is {list(base.shapes[name])}", hint)
        yield name, tensor


def _is_saved(name: str, adapter: Adapter) -> bool:
    """Whether a tensor is of a module that ``modules_to_save`` lists (peft's ``_set_trainable``), or inside of one."""
    parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return any(parent.endswith(one) for one in adapter.config.saved for parent in parents)


def _other_experts(name: str | None, base: Base) -> str:
    if name is not None and (find_experts([name]) == "unfused" or name in base.stacked):
        form = "one by one" if base.unfused else "stacked"
        return f"whole experts are taken only where the checkpoint has them in the same form; here they are {form}"
    return "the adapter may be another model's"


def _require_complete(adapter: Adapter, base: Base, updates: Mapping[str, object]) -> None:
    """No layer that ``target_modules`` lists has been left out; peft would only warn, and use it unadapted."""
    config = adapter.config
    if not config.every_layer:
        return
    for name, shape in base.shapes.items():
        stored = base.layout.stored(name)
        if _is_layer(name, shape) and name not in updates and not _is_saved(stored, adapter):
            module = stored.removesuffix(".weight")
            if any(module == one or module.endswith(f".{one}") for one in config.targets):
                raise InputError(
                    f"{show(adapter.files[-1])}: tensor 'base_model.model.{module}.lora_A.weight' is missing,"
                    f" though target_modules lists that layer",
                    "the file is cut short, or the adapter is another model's",
                )


def _is_layer(name: str, shape: Shape) -> bool:
    """Whether transformers has it as a linear layer; its experts are stacked parameters."""
    return len(shape) == 2 and name.endswith(".weight") and find_experts([name]) == "stacked"
