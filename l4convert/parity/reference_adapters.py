"""LoRA adapters in the reference: merged by the PEFT library itself, into transformers' model."""

from __future__ import annotations

import warnings
from typing import Any

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.adapters import Adapter, adapter_layout, open_adapter
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import find_experts
from l4convert.checkpoint.text import show
from l4convert.errors import InputError, backend_missing, summary_of

_PLAIN_TYPES = {"BFLOAT16": "bfloat16", "FLOAT16": "float16"}


def merge_with_peft(model: Any, checkpoint: Checkpoint) -> Any:
    """Merge the checkpoint's adapters into ``Llama4ForCausalLM``, in its order, and round once.

    Args:
        model: float32, with the checkpoint's weights before any adapter.
        checkpoint: With ``adapters``.

    Returns:
        ``model``: peft's merge, then rounded to the types in which the checkpoint has its weights.

    Raises:
        BackendMissing: peft is not installed.
        InputError: peft does not take an adapter.
    """
    if not checkpoint.adapters:
        return model
    try:
        import peft  # noqa: F401  # the functions below use it
    except ImportError as error:
        raise backend_missing("peft") from error
    import torch

    for adapter in (open_adapter(applied.path) for applied in checkpoint.adapters):
        _require_stacked(adapter)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # peft warns of targets that the text part does not have
            try:
                _merge(model, adapter, checkpoint)
            except Exception as error:  # whatever peft raises on an adapter that it does not take
                raise InputError(f"{show(adapter.path)}: peft cannot merge it: {summary_of(error)}") from error
    _round(model, checkpoint)
    return model


def _merge(model: Any, adapter: Adapter, checkpoint: Checkpoint) -> None:
    import peft
    from peft.tuners.lora import LoraLayer

    layout = adapter_layout(adapter)
    if _has_old_experts(adapter, checkpoint):
        for layer in model.model.layers:
            if hasattr(layer.feed_forward, "experts"):
                layer.feed_forward.experts.is_transposed = True  # how peft is told of the order before its 0.19
    holder = _as_trained(model, layout.name)
    adapted = peft.PeftModel.from_pretrained(holder, str(adapter.path)).eval()
    for layer in [module for module in adapted.modules() if isinstance(module, LoraLayer)]:
        _merge_exactly(layer)
    merged = adapted.merge_and_unload()
    if layout.name == "model.language_model":
        model.lm_head = merged.lm_head  # peft puts another layer in its place; all others are inside of model.model


def _merge_exactly(layer: Any) -> None:
    """Have peft merge a layer in float64, and keep the result in float32.

    In narrower types peft rounds an embedding's or an expert's update before it adds it, and a linear layer's not.
    """
    base, name = layer.get_base_layer(), getattr(layer, "parameter_name", "weight")
    for factors in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        factors.double()
    weight = getattr(base, name)
    weight.data = weight.data.double()
    layer.merge()
    weight = getattr(base, name)
    weight.data = weight.data.float()


def _as_trained(model: Any, layout: str) -> Any:
    """The model, under the names of the one that the adapter was trained on: its text decoder may lie deeper."""
    import torch

    if layout == "plain":
        return model
    holder: Any = torch.nn.Module()
    if layout == "language_model":
        holder.language_model = model
        return holder
    holder.model = torch.nn.Module()
    holder.model.language_model = model.model
    holder.lm_head = model.lm_head
    return holder


def _has_old_experts(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    """Whether lora_A of a stack of experts [E, n, m] has n columns, not m: as peft wrote it before 0.19."""
    config, targets = checkpoint.config, adapter.config.parameters
    for place, (a, _) in adapter.pairs.items():
        if place.module.endswith(".experts"):
            both = sum(any(one.endswith(name) for one in targets) for name in ("gate_up_proj", "down_proj")) == 2
            down = place.depth == 0 and (both or any(one.endswith("down_proj") for one in targets))
            rows, cols = config.intermediate_size, config.hidden_size
            rows, cols = (rows, cols) if down else (cols, 2 * rows)
            old = () < adapter.config.peft < (0, 19) or rows != cols
            return old and a.dims[1] == rows
    return False


def _require_stacked(adapter: Adapter) -> None:
    """transformers' experts are stacked, so peft finds no layer for an adapter of single ones."""
    single = [place.module for place in adapter.pairs if find_experts([f"{place.module}."]) == "unfused"]
    if single:
        raise InputError(
            f"{show(adapter.files[-1])}: adapts {show(single[0])!r}, and transformers has experts stacked",
            "such an adapter can be converted, but not compared with peft's merge",
        )


def _round(model: Any, checkpoint: Checkpoint) -> None:
    """One rounding to the checkpoint's types, as the conversion does; weights that no adapter changed stay."""
    import torch

    for name, parameter in model.named_parameters():
        stored = _PLAIN_TYPES.get(_stored(name, checkpoint).dtype.name)
        if stored is not None:
            parameter.data = parameter.data.to(getattr(torch, stored)).float()


def _stored(name: str, checkpoint: Checkpoint) -> LazyTensor:
    """The checkpoint's tensor of this name; of a stack that it has one by one, the first expert's."""
    if name in checkpoint.tensors:
        return checkpoint.tensors[name]
    first = name.rpartition(".")[0] + ".0."
    return next(tensor for other, tensor in checkpoint.tensors.items() if other.startswith(first))
