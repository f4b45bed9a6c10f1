"""adapter_config.json of a LoRA adapter, as the PEFT library writes it.

Fields and defaults are those of peft's ``LoraConfig`` (0.21.2, peft/tuners/lora/config.py). What would make the
merged weight anything but ``base + scale * B @ A`` is refused by name, and so is a key that is not known: a later
version's feature must not be lost in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.text import json_type, parse_object, quote, read_bytes, show

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000
MAX_RANK = 1 << 16
# Beyond any scale in use by orders of magnitude; what is larger is a damaged file.
MAX_ALPHA = 1e6
MAX_LISTED = 100_000
MERGE_HINT = "merge it with peft (merge_and_unload), save the model, and convert that"

# Say how the adapter was trained or initialised, where that left the base as it was.
_NO_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
})  # fmt: skip
# Change the merged weight, or the model, in a way of their own.
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales the merged weight by a norm",
    "lora_bias": "biases of lora_B are not merged",
    "layer_replication": "it makes another model, with layers repeated",
    "use_qalora": "QALoRA is not merged",
    "alora_invocation_tokens": "activated LoRA works on some tokens only and cannot be merged",
    "arrow_config": "Arrow chooses among adapters at run time and cannot be merged",
    "use_bdlora": "block-diagonal LoRA is not merged",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "MonteCLoRA is not merged",
    "velora_config": "VeLoRA is not merged",
    "megatron_config": "Megatron's layers are not Llama 4's",
    "trainable_token_indices": "trained single tokens are not merged",
}
# Ways to begin that leave the base as it was; the others subtract something from it, or quantize it.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_READ = frozenset({
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern",
    "target_modules", "target_parameters", "use_rslora",
})  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """What of an adapter's config decides the merged weights.

    Attributes:
        file: The file, as messages name it.
        rank, alpha: Of modules that no pattern is about.
        rslora: The scale is alpha / sqrt(rank) rather than alpha / rank.
        rank_pattern, alpha_pattern: Regular expression over the end of a module's name to rank or alpha.
        targets: Names of the adapted modules, or ends of them; empty where they are given by a regular expression.
        every_layer: Whether ``targets`` says all: nothing else narrows it.
        parameters: Names of the adapted parameters, or ends of them.
        saved: Ends of the names of modules that were trained whole.
        base: The model it was trained on, as whoever trained it called it.
        peft: Version of peft that wrote it; () where that is not said.
    """

    file: str
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    every_layer: bool = True
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    base: str | None = None
    peft: tuple[int, ...] = ()

    def scale(self, rank: int, alpha: float) -> float:
        """What B @ A is multiplied by (peft's ``LoraLayer.update_layer``)."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an adapter_config.json.

    Raises:
        InputError: The file is unusable, is of another method than LoRA, uses a variant that is not merged, or has a
            value that is out of range.
    """
    file = show(path)
    fields = Fields(parse_object(read_bytes(path, MAX_CONFIG_BYTES), file), file)
    _require_plain_lora(fields)
    parameters = _names(fields, "target_parameters")
    if parameters and fields.boolean("fan_in_fan_out", False):
        fields.fail("fan_in_fan_out", "is true, which peft does not combine with target_parameters", MERGE_HINT)
    targets = fields.get("target_modules", None)
    version = fields.get("peft_version", None)
    base = fields.get("base_model_name_or_path", None)
    return AdapterConfig(
        file=file,
        rank=fields.integer("r", high=MAX_RANK),
        alpha=_alpha(fields, "lora_alpha"),
        rslora=fields.boolean("use_rslora", False),
        rank_pattern=_pattern(fields, "rank_pattern", lambda table, key: table.integer(key, high=MAX_RANK)),
        alpha_pattern=_pattern(fields, "alpha_pattern", _alpha),
        targets=() if isinstance(targets, str) else _names(fields, "target_modules"),
        every_layer=all(fields.values.get(key) in (None, "", []) for key in _NARROWING),
        parameters=parameters,
        saved=_names(fields, "modules_to_save"),
        base=base if isinstance(base, str) else None,
        peft=_version(version) if isinstance(version, str) else (),
    )


_NARROWING = ("exclude_modules", "layers_pattern", "layers_to_transform")


def _require_plain_lora(fields: Fields) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        fields.fail("peft_type", f"is {quote(kind)}, only 'LORA' can be merged", MERGE_HINT)
    if fields.get("bias", "none") != "none":
        fields.fail("bias", f"is {quote(fields.get('bias'))}, only 'none' is supported", MERGE_HINT)
    start = fields.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _HARMLESS_STARTS):
        fields.fail("init_lora_weights", f"is {quote(start)}, which changes the base's weights", MERGE_HINT)
    for key, why in _REFUSED.items():
        if fields.values.get(key):
            fields.fail(key, f"is set: {why}", MERGE_HINT)
    known = _READ | _NO_EFFECT | _REFUSED.keys()
    unknown = [key for key, value in fields.values.items() if key not in known and value]
    if unknown:
        hint = f"made by a later peft than 0.21, or by another program; {MERGE_HINT}"
        fields.fail(show(unknown[0]), f"is {quote(fields.values[unknown[0]])}, a setting that is not known", hint)


def _alpha(fields: Fields, key: str) -> float:
    alpha = fields.number(key)
    if alpha > MAX_ALPHA:
        fields.fail(key, f"is {alpha:g}, more than {MAX_ALPHA:,.0f}")
    return alpha


def _pattern(fields: Fields, key: str, read: Any) -> dict[str, Any]:
    table = fields.object(key)
    if table is None:
        return {}
    if len(table.values) > MAX_LISTED:
        fields.fail(key, f"has {len(table.values):,} entries, more than {MAX_LISTED:,}")
    return {name: read(_shown(table, name), name) for name in table.values}


def _shown(table: Fields, name: str) -> Fields:
    """The table, such that a message about a key of any length is one short line."""
    return table if show(name) == name else Fields({name: table.values[name]}, table.file, f"{table.prefix}(long key) ")


def _names(fields: Fields, key: str) -> tuple[str, ...]:
    """A list of names; null and absent are none of them."""
    names = fields.array(key) or []
    if len(names) > MAX_LISTED:
        fields.fail(key, f"has {len(names):,} entries, more than {MAX_LISTED:,}")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            fields.fail(f"{key}[{index}]", f"must be a name, not {json_type(name) if name != '' else 'empty'}")
    return tuple(names)


def _version(text: str) -> tuple[int, ...]:
    """``"0.18.1"`` to (0, 18, 1); what follows the first part that is no number does not count."""
    numbers = []
    for part in text[:40].split("."):
        if not part.isascii() or not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
