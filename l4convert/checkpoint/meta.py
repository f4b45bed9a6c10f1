"""Checkpoints as Meta releases them: params.json, consolidated.NN.pth and tokenizer.model.

The format is what Meta's own code reads (``llama_models``): ``llama4/generation.py`` for the folder, the ``load_hook``
methods of its modules for names, ``checkpoint.py`` for files that each hold a part of every tensor. Nothing of a file
is executed (:mod:`l4convert.checkpoint.state_pickle`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from l4convert.checkpoint.base import Checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.hf import CONFIG, SIDECARS, sidecars
from l4convert.checkpoint.hf_files import config_json, generation_config_json, tokenizer_config_json
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.meta_experts import ExpertScales, open_scales
from l4convert.checkpoint.meta_names import canonical_tensors
from l4convert.checkpoint.meta_params import read_params
from l4convert.checkpoint.meta_shards import open_shards
from l4convert.checkpoint.prequantized import quantized_parts
from l4convert.checkpoint.pth_file import DOWNLOAD_HINT
from l4convert.checkpoint.remote import names_in
from l4convert.checkpoint.text import require_file, show
from l4convert.checkpoint.tiktoken_model import BEGIN, END, PAD, RESERVED, read_ranks, tokenizer_json
from l4convert.errors import InputError

PARAMS, TOKENIZER = "params.json", "tokenizer.model"
# What Meta's own generation draws tokens with (llama4/generation.py, ``generate``).
_SAMPLING = {"temperature": 0.6, "top_p": 0.9}
_SPECIAL = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}


def detect(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of Meta's and not of Hugging Face's; some folders hold both."""
    if names_in(path, ".safetensors") or (path / "model.safetensors.index.json").exists():
        return False
    return (path / PARAMS).exists() or any(file.name.startswith("consolidated") for file in names_in(path, ".pth"))


def open_meta(path: Path) -> Checkpoint:
    """Open a folder; the tensors are found, checked against params.json both ways, and not read.

    Raises:
        InputError: Anything is missing, unexpected, of another shape or type, or not what it says it is.
    """
    require_file(path / PARAMS, DOWNLOAD_HINT)
    shards = open_shards(path)
    rows = shards.parts("tok_embeddings.weight")[0].dims
    config = read_params(path / PARAMS, len(shards) * rows[0] if len(rows) == 2 else 1)
    scales = open_scales(path, len(shards))
    tensors = canonical_tensors(shards, config, scales)
    kept, generated = _small_files(path, config, tensors)
    files = (path / PARAMS, *(file.path for file in shards.files), *(scales.files if scales else ()))
    return Checkpoint(
        path=path,
        format="meta",
        config=config,
        tensors=tensors,
        experts="stacked",
        sidecars=kept,
        files=files + ((path / TOKENIZER,) if (path / TOKENIZER).exists() else ()),
        quantization=None if scales is None else _words(scales, tensors),
        generated=generated,
    )


def _words(scales: ExpertScales, tensors: Mapping[str, LazyTensor]) -> str:
    kinds = [next((part.kind for part in quantized_parts(tensor)), None) for tensor in tensors.values()]
    found = list(dict.fromkeys(kind for kind in kinds if kind is not None))
    count = sum(kind is not None for kind in kinds)
    return f"Meta's {scales.kind.upper()}: {', '.join(found) or 'nothing'} ({count:,} of {len(tensors):,} weights)"


def _small_files(
    path: Path, config: DecoderConfig, tensors: Mapping[str, LazyTensor]
) -> tuple[tuple[Path, ...], Mapping[str, bytes]]:
    """The folder's own files that go into the artifact, and those that are made because it lacks them."""
    kept = sidecars(path, [name for name in SIDECARS if name != CONFIG])  # config.json follows from params.json
    dtype = tensors["model.embed_tokens.weight"].dtype
    made: dict[str, Callable[[], bytes]] = {
        CONFIG: partial(config_json, config, dtype),
        "generation_config.json": partial(generation_config_json, config, _SAMPLING),
    }
    if (path / TOKENIZER).exists():
        file = show(path / TOKENIZER)
        ranks = read_ranks(path / TOKENIZER)
        if len(ranks) + RESERVED != config.vocab_size:
            what = f"{len(ranks):,} tokens and {RESERVED:,} special ones, but the model has {config.vocab_size:,}"
            raise InputError(f"{file}: {what}", "take the tokenizer.model that came with the weights, or none")
        made["tokenizer.json"] = partial(tokenizer_json, ranks, file)
        made["tokenizer_config.json"] = partial(tokenizer_config_json, _SPECIAL, config.max_position_embeddings)
    present = {file.name for file in kept}
    return kept, Generated({name: make for name, make in made.items() if name not in present})


class Generated(Mapping[str, bytes]):
    """Files that are made when they are first asked for: a tokenizer of 200,000 tokens takes seconds."""

    def __init__(self, made: Mapping[str, Callable[[], bytes]]) -> None:
        self._made = dict(made)
        self._content: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self._content:
            self._content[name] = self._made[name]()
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)
