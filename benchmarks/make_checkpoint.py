"""Write a checkpoint of a published model's shape, with random weights: something to measure with.

    python benchmarks/make_checkpoint.py --preset scout --layers 1 --vocab 4096 --output DIR

The text decoder as transformers saves ``Llama4ForCausalLM``: config.json in the spelling of the published checkpoints,
BF16 weights in safetensors files of about the published size, an index. There is no tokenizer; nothing here needs one.

Weights are normal with a standard deviation of 0.02, norms near 1. To be as fast as the disk, only one buffer of 17
million values is drawn; every tensor is that buffer over and over, from a start of its own. ``--sparse`` writes nothing
but the headers: the rest of each file is a hole, which takes no disk and reads as zeros, so that a model of any size
can be planned and read. A real layer of Scout is 4.4 GB; its embedding and head are another 4.1 GB, hence ``--vocab``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from l4convert.checkpoint.base import Experts
from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.names import Shape, expected_tensors
from l4convert.checkpoint.presets import PRESETS
from l4convert.errors import InputError, L4Error, UsageError
from l4convert.progress import NO_PROGRESS, Progress, Task, format_amount, terminal_progress

SHARD_BYTES = 4_500_000_000  # Scout is published in 50 files of 4 to 5 GB
BUFFER_ELEMENTS = (1 << 24) + 1021  # no multiple of a row, so that rows differ
BYTES = 2  # an element of BF16
NORM = "norm.weight"


def main() -> int:
    options = parse_options()
    try:
        config = resized(PRESETS[options.preset], options.layers, {**dict(options.set), **options.vocab})
        write_checkpoint(
            options.output,
            config,
            experts=options.experts,
            sparse=options.sparse,
            seed=options.seed,
            shard_bytes=int(options.shard_gb * 1e9),
            progress=terminal_progress(),
        )
    except L4Error as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        print(f"error: {error.message}{hint}", file=sys.stderr)
        return int(error.exit_code)
    count = sum(prod(shape) for shape in expected_tensors(config, options.experts).values())
    files = len(list(options.output.glob("*.safetensors")))
    content = "holes" if options.sparse else "random weights"
    print(
        f"{options.output}: {count:,} parameters, {format_amount(count * BYTES, 'B')} of {content} in {files} file(s)"
    )
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="scout")
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    parser.add_argument("--experts", choices=["stacked", "unfused"], default="stacked")
    parser.add_argument("--sparse", action="store_true", help="holes for weights")
    parser.add_argument("--vocab", type=vocab, default={}, metavar="N", help="a smaller embedding and head")
    parser.add_argument("--set", type=assignment, action="append", default=[], metavar="KEY=N", help="any other width")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="size of a file, where tensors allow")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def vocab(text: str) -> dict[str, int]:
    return {"vocab_size": int(text)}


def assignment(text: str) -> tuple[str, int]:
    key, _, value = text.partition("=")
    return key, int(value)


def resized(config: DecoderConfig, layers: int | None, widths: Mapping[str, int]) -> DecoderConfig:
    """The first layers of a model, some of its integers replaced.

    Raises:
        UsageError: There are fewer layers, or no such integer, or it is not positive.
    """
    integers = {field.name for field in dataclasses.fields(config) if type(getattr(config, field.name)) is int}
    for key, value in widths.items():
        if key not in integers or value < 1:
            raise UsageError(f"{key}={value} cannot be set", f"positive, and one of: {', '.join(sorted(integers))}")
    count = len(config.layers) if layers is None else layers
    if not 1 <= count <= len(config.layers):
        raise UsageError(f"there are 1 to {len(config.layers)} layers, not {count}")
    return dataclasses.replace(config, **cast(Any, widths), layers=config.layers[:count])


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """config.json of ``Llama4ForCausalLM`` with the keys that the published checkpoints have in ``text_config``.

    Token ids beyond the vocabulary are left out: transformers refuses them.
    """
    values = dataclasses.asdict(config)
    rope, eos = values.pop("rope_scaling"), values.pop("eos_token_ids")
    layers, values["eos_token_id"] = values.pop("layers"), list(eos)
    moe = [index for index, layer in enumerate(layers) if layer["moe"]]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values[key] if isinstance(values[key], list) else [values[key]]
        if any(i is None or i >= config.vocab_size for i in ids):
            values[key] = None
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        **values,
        "num_hidden_layers": len(layers),
        "moe_layers": moe,
        "interleave_moe_layer_step": moe[0] + 1 if moe else len(layers) + 1,
        "no_rope_layers": [int(layer["rope"]) for layer in layers],
        "layer_types": ["chunked_attention" if layer["chunked"] else "full_attention" for layer in layers],
        "rope_scaling": None if rope is None else {**rope, "rope_type": "llama3"},
    }


def write_checkpoint(
    path: Path,
    config: DecoderConfig,
    *,
    experts: Experts = "stacked",
    sparse: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Write a checkpoint; memory does not grow with it.

    Raises:
        UsageError: ``path`` is already there.
        InputError: The disk is too small.
    """
    shapes = expected_tensors(config, experts)
    total = BYTES * sum(prod(shape) for shape in shapes.values())
    require_room(path, 0 if sparse else total)
    noise = None if sparse else Noise(seed)
    path.mkdir(parents=True)
    try:
        with progress.task("Writing weights", 0 if sparse else total) as task:
            write_shards(path, list(shards(shapes, shard_bytes)), noise, task)
        (path / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")
    except BaseException:
        shutil.rmtree(path)  # half a checkpoint is of no use
        raise


def require_room(path: Path, needed: int) -> None:
    if path.exists():
        raise UsageError(f"{path} is already there", "name another folder, or remove it")
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        hint = "fewer layers, a smaller --vocab, or --sparse"
        raise InputError(f"{folder}: {needed} bytes are needed, {free} are free: {needed - free} too few", hint)


def shards(shapes: Mapping[str, Shape], limit: int) -> Iterator[dict[str, Shape]]:
    """Tensors in order, as many a file as stay within ``limit`` bytes; one that does not has a file of its own."""
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in shapes.items():
        tensor = BYTES * prod(shape)
        if shard and size + tensor > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += tensor
    yield shard


def write_shards(path: Path, parts: list[dict[str, Shape]], noise: Noise | None, task: Task) -> None:
    """The weight files, then the index that names them."""
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        write_shard(path / name, shapes, noise, task)
    total = BYTES * sum(prod(shape) for shapes in parts for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_shard(path: Path, shapes: Mapping[str, Shape], noise: Noise | None, task: Task) -> None:
    """One safetensors file: the length of the header in 8 bytes, the header, the tensors one after another."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + BYTES * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb", buffering=0) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if noise is None:
            file.truncate(8 + len(header) + offset)
            return
        for name, shape in shapes.items():
            for piece in noise.pieces(name, BYTES * prod(shape)):
                written = 0
                while written < len(piece):
                    written += file.write(piece[written:])
                task.advance(len(piece))


class Noise:
    """Random BF16 values, drawn once."""

    def __init__(self, seed: int) -> None:
        normal = np.random.default_rng(seed).standard_normal(BUFFER_ELEMENTS, np.float32)
        self._weights = as_bytes(np.float32(0.02) * normal)
        self._norms = as_bytes(1 + np.float32(0.1) * normal)
        self._seed = seed

    def pieces(self, name: str, size: int) -> Iterator[memoryview]:
        """``size`` bytes for a tensor, the same for the same seed and name."""
        values = self._norms if name.endswith(NORM) else self._weights
        rng = np.random.default_rng((self._seed, zlib.crc32(name.encode())))
        start = BYTES * int(rng.integers(BUFFER_ELEMENTS))
        while size:
            piece = values[start : start + size]
            yield piece
            size -= len(piece)
            start = 0


def as_bytes(values: np.ndarray) -> memoryview:
    return values.astype(ml_dtypes.bfloat16).view(np.uint8).data


if __name__ == "__main__":
    sys.exit(main())
