"""The tensors of an adapter: pairs of low-rank factors, and weights that were trained whole.

Names are those of peft's ``get_peft_model_state_dict``: ``base_model.model.``, the module's name in the model that the
adapter was trained on, and ``.lora_A.weight`` [r, in] and ``.lora_B.weight`` [out, r]; for an embedding
``.lora_embedding_A`` [r, vocabulary] and ``.lora_embedding_B`` [hidden, r]. Adapters of several parameters of one
module are nested: each ``.base_layer`` in a name is one layer further in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from l4convert.checkpoint.adapters.config import CONFIG, MERGE_HINT, AdapterConfig, read_adapter_config
from l4convert.checkpoint.names import is_vision
from l4convert.checkpoint.safetensors_file import SAFETENSORS_NAMES, Stored, open_safetensors
from l4convert.checkpoint.text import show
from l4convert.errors import InputError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
FLOATS = ("BF16", "F16", "F32")

_INNER = ".base_layer"
_SIDES = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_VARIANTS = {
    ".lora_magnitude_vector": "DoRA scales the merged weight by a norm",
    ".lora_A.bias": "biases are not merged",
    ".lora_B.bias": "biases are not merged",
    ".token_adapter.": "trained single tokens are not merged",
}


@dataclass(frozen=True)
class Place:
    """Where a pair belongs.

    Attributes:
        module: The module's name in the model that the adapter was trained on.
        depth: How many adapters of other parameters of that module are around this one.
        embedding: Whether it is one of a table of embeddings, whose factors are stored the other way round.
    """

    module: str
    depth: int
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter whose names and dtypes were checked; whether it fits a model is not known yet.

    Attributes:
        path: The folder it lies in.
        config: What adapter_config.json says.
        pairs: Factors A and B by where they belong, in the order of the file.
        whole: Weights that replace the base's, by name in the model that the adapter was trained on.
        vision: How many tensors are about the image encoder or its projector, which are not converted.
        files: Both files, for digests.
    """

    path: Path
    config: AdapterConfig
    pairs: Mapping[Place, tuple[Stored, Stored]]
    whole: Mapping[str, Stored]
    vision: int
    files: tuple[Path, ...]


def is_adapter(path: Path) -> bool:
    """Whether a folder looks like an adapter, whole or not; reads file names only."""
    return any((path / name).exists() for name in (CONFIG, WEIGHTS, PICKLED))


def open_adapter(path: Path) -> Adapter:
    """Open an adapter's folder; reads its config and the header of its weights.

    Raises:
        InputError: Anything is missing or is not what it says it is, or it is an adapter that cannot be merged.
    """
    path = Path(path)
    try:
        _require_folder(path)
        config = read_adapter_config(path / CONFIG)
        if not (path / WEIGHTS).exists() and (path / PICKLED).exists():
            raise InputError(
                f"{show(path / PICKLED)}: a pickle, which could run anything; only {WEIGHTS} is read",
                "load the adapter with peft where you trust it, and save_pretrained it again",
            )
        return _sorted_out(path, config, open_safetensors(path / WEIGHTS))
    except OSError as error:
        raise InputError(f"{show(path)}: cannot be read: {show(error.strerror)}") from error


def _require_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"{show(path)}: no such folder", "give the folder of an adapter, or hf://org/name[@revision]")
    if not path.is_dir():
        raise InputError(f"{show(path)}: not a folder", f"give the folder that holds {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).exists():
        inner = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        hint = f"give the adapter's folder, such as {show(path / inner[0])}" if inner else "is it a checkpoint?"
        raise InputError(f"{show(path)}: not an adapter: it has no {CONFIG}", hint)


def _sorted_out(path: Path, config: AdapterConfig, stored: Mapping[str, Stored]) -> Adapter:
    halves: dict[Place, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    vision = 0
    for key, tensor in stored.items():
        where = f"{show(tensor.file)}: tensor '{show(key)}'"
        if not key.startswith(PREFIX):
            raise InputError(f"{where} is not named as peft names them: '{PREFIX}...'", "save the adapter with peft")
        if SAFETENSORS_NAMES[tensor.dtype] not in FLOATS:
            found = SAFETENSORS_NAMES[tensor.dtype]
            raise InputError(f"{where} is {found}, expected one of {', '.join(FLOATS)}")
        name = key.removeprefix(PREFIX)
        if is_vision(name):
            vision += 1
            continue
        for part, why in _VARIANTS.items():
            if part in name:
                raise InputError(f"{where} cannot be merged: {why}", MERGE_HINT)
        side = next((side for side in _SIDES if name.endswith(side)), None)
        if side is None:
            _add_whole(whole, name, tensor, where)
            continue
        half, embedding = _SIDES[side]
        module, depth = _unwrapped(name.removesuffix(side))
        halves.setdefault(Place(module, depth, embedding), {})[half] = tensor
    _require_any(path, stored, vision)
    return Adapter(path, config, _pairs(halves), whole, vision, (path / CONFIG, path / WEIGHTS))


def _unwrapped(name: str) -> tuple[str, int]:
    depth = 0
    while name.endswith(_INNER):
        name, depth = name.removesuffix(_INNER), depth + 1
    return name, depth


def _add_whole(whole: dict[str, Stored], name: str, tensor: Stored, where: str) -> None:
    """A weight saved whole; beside LoRA of the same module, peft saves the base's under ``base_layer``."""
    if ".lora_" in name:
        raise InputError(f"{where} is of no kind of LoRA that is known", MERGE_HINT)
    plain = name.replace(f"{_INNER}.", ".")
    if plain in whole:
        raise InputError(f"{where} is there twice, also as '{show(whole[plain].key)}'")
    whole[plain] = tensor


def _require_any(path: Path, stored: Iterable[str], vision: int) -> None:
    names = list(stored)
    if not names:
        raise InputError(f"{show(path / WEIGHTS)}: no tensor in it", "the adapter was saved before it was trained")
    if len(names) == vision:
        raise InputError(f"{show(path / WEIGHTS)}: all {vision} tensors are of the vision part, which is not converted")


def _pairs(halves: Mapping[Place, Mapping[str, Stored]]) -> dict[Place, tuple[Stored, Stored]]:
    for both in halves.values():
        if len(both) == 1:
            (half, tensor), other = next(iter(both.items())), "B" if "A" in both else "A"
            missing = tensor.key.replace(f"_{half}", f"_{other}") if half in both else ""
            raise InputError(
                f"{show(tensor.file)}: tensor '{show(missing)}' is missing, lora_{half} of it is there",
                "download the adapter again, or save it again",
            )
    return {place: (both["A"], both["B"]) for place, both in halves.items()}
