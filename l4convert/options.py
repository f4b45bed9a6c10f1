"""What a conversion, or the plan of one, is asked for: the options of the commands, as the library takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l4convert.planning.working import PREFILL_TOKENS
from l4convert.runtime.calibration_text import DEFAULT_TOKENS


@dataclass(frozen=True, kw_only=True)
class HowOptions:
    """How a checkpoint is converted, whether it is done or only planned.

    ``kv_cache`` and ``compute`` are the target's own where they are None. ``jobs`` and ``memory_limit`` (as "4G")
    change how fast the artifact is written, not one byte of it. ``kv_dtype``, ``kv_granularity`` and ``kv_layers`` go
    over the recipe's ``[kv_cache]`` table. ``adapters`` are folders of LoRA adapters, merged in their order.
    """

    target: str = "cpu"
    recipe: str = "int4"
    block_size: int | None = None
    kv_cache: str | None = None
    kv_dtype: str | None = None
    kv_granularity: str | None = None
    kv_layers: str | None = None
    compute: str | None = None
    share_weights: bool = False
    verify_passes: bool = False
    overwrite: bool = False
    restart: bool = False
    jobs: int | None = None
    memory_limit: str | None = None
    adapters: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ConvertOptions(HowOptions):
    """What ``l4convert convert`` is asked for; field by field the options of that command.

    ``cluster`` changes where the bytes are computed (:func:`l4convert.emit.cluster.connected`), not one of them.
    ``calibration`` is the text that quantized caches need, of which so many tokens are used.
    """

    checkpoint: Path
    output: Path
    cluster: str | None = None
    calibration: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS


@dataclass(frozen=True)
class PlanOptions(HowOptions):
    """What ``l4convert plan`` is asked for: a checkpoint or a preset, how it would be converted, and its use.

    ``target`` may be a hardware profile, too: then the artifact is for its first runtime, and what fits is planned.
    ``context`` (as "1M"), ``batch``, ``prefill_tokens`` and ``tensor_parallel`` are those of
    :class:`l4convert.planning.use.Wanted`.
    """

    checkpoint: Path | None = None
    preset: str | None = None
    output: Path | None = None
    context: str | None = None
    batch: int = 1
    prefill_tokens: int = PREFILL_TOKENS
    tensor_parallel: int | None = None
