"""Checkpoints as Hugging Face's transformers saves them: config.json and safetensors files, perhaps with an index."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from l4convert.checkpoint.base import Checkpoint
from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.hf_config import MAX_CONFIG_BYTES, read_config, read_quantization
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import (
    Layout,
    Shape,
    expected_tensors,
    find_experts,
    find_layout,
    is_buffer,
    is_vision,
)
from l4convert.checkpoint.quantized import Source, read_quantized
from l4convert.checkpoint.remote import is_file, names_in
from l4convert.checkpoint.safetensors_file import DTYPES, MAX_TENSORS, SAFETENSORS_NAMES, Stored, open_safetensors
from l4convert.checkpoint.templates import check_sidecar
from l4convert.checkpoint.text import and_more, parse_object, quote, read_bytes, require_file, require_inside, show
from l4convert.errors import InputError

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"  # where ModelOpt says how it quantized
ADAPTER = "adapter_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
WEIGHT_DTYPES = ("BF16", "F16", "F32")
SIDECARS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
DOWNLOAD_HINT = "download the checkpoint again, or finish the download"


def detect(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of this format, whole or not."""
    return (path / CONFIG).exists() or (path / INDEX).exists() or bool(names_in(path, ".safetensors"))


def open_hf(path: Path) -> Checkpoint:
    """Open a folder; the tensors are found, checked against the config both ways, and not read.

    Raises:
        InputError: Anything is missing, unexpected, of another shape or dtype, or not what it says it is.
    """
    if (path / ADAPTER).exists() and not (path / CONFIG).exists():
        raise InputError(f"{show(path)}: holds an adapter, no model", "give it with --adapter, beside its model")
    require_file(path / CONFIG, DOWNLOAD_HINT)
    config = read_config(path / CONFIG)
    index = path / INDEX
    weight_map = _read_index(index) if index.exists() or index.is_symlink() else None
    shards = _shards(path, weight_map)
    stored = _read_shards(shards)
    listing = index if weight_map is not None else shards[0]
    if weight_map is not None:
        _check_index(index, weight_map, stored)
    layout = find_layout(stored)
    experts = find_experts(stored)
    expected = expected_tensors(config, experts)
    plain = _text_tensors(stored, layout, config.tie_word_embeddings)
    made, quantization = _read_quantized(path, plain, expected, layout)
    _check_names(listing, stored, plain, made, expected, layout)
    for name, tensor in plain.items():
        _check_tensor(tensor, expected[name])
    tensors: dict[str, LazyTensor] = {**plain, **made}
    return Checkpoint(
        path=path,
        format="hf",
        config=config,
        tensors={name: tensors[name] for name in expected},
        experts=experts,
        sidecars=sidecars(path),
        files=(path / CONFIG, *(file for file in (path / MODELOPT, index) if file.exists()), *shards),
        quantization=quantization,
    )


def _read_quantized(
    path: Path, stored: dict[str, Stored], expected: Mapping[str, Shape], layout: Layout
) -> tuple[Mapping[str, LazyTensor], str | None]:
    """The weights that are stored quantized, and how, in words; what they are made of is taken out of ``stored``."""
    config, method = read_quantization(path / CONFIG), None
    if config is not None:
        method = config.get("quant_method", None)
    elif (path / MODELOPT).exists():
        file = show(path / MODELOPT)
        config, method = Fields(parse_object(read_bytes(path / MODELOPT, MAX_CONFIG_BYTES), file), file), "modelopt"
    if config is None:
        return {}, None
    read = read_quantized(method, Source(config, stored, expected, layout))
    return read.tensors, read.words


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name, from ``weight_map``; every file name is a plain one."""
    file = show(index)
    fields = Fields(parse_object(read_bytes(index, MAX_INDEX_BYTES), file), file).object("weight_map")
    if fields is None or not fields.values:
        raise InputError(f"{file}: weight_map is missing or empty")
    for tensor, name in fields.values.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise InputError(f"{file}: tensor '{show(tensor)}' is in {quote(name)}, which is no plain file name")
    return dict(fields.values)


def _is_plain(name: str) -> bool:
    """A file name that cannot point out of its folder on any system."""
    return (
        name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:") and len(name.encode()) <= 255
    )


def _shards(path: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    """The weight files; each is there."""
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not is_file(path / name)]
        if absent:
            more = and_more(len(absent) - 1)
            raise InputError(f"{show(path / absent[0])}: listed in {INDEX} but absent{more}", DOWNLOAD_HINT)
        return [path / name for name in names]
    if is_file(path / SINGLE) or (path / SINGLE).is_symlink():
        return [path / SINGLE]
    found = names_in(path, ".safetensors")
    if not found:
        raise InputError(f"{show(path)}: no {SINGLE}, no {INDEX}", "only safetensors weights can be read")
    if len(found) > 1:
        raise InputError(f"{show(path)}: {len(found)} safetensors files but no {INDEX}", DOWNLOAD_HINT)
    if not _is_plain(found[0].name):
        raise InputError(f"{show(found[0])}: not a plain file name", f"call it {SINGLE}")
    return found


def _read_shards(shards: Iterable[Path]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in open_safetensors(shard).items():
            if name in stored:
                raise InputError(f"{show(shard)}: tensor '{show(name)}' is also in {show(stored[name].file.name)}")
            stored[name] = tensor
        if len(stored) > MAX_TENSORS:
            raise InputError(f"{show(shard)}: more than {MAX_TENSORS:,} tensors with those of the files before it")
    return stored


def _check_index(index: Path, weight_map: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    """The index and the files agree on where every tensor is."""
    absent = [name for name, file in weight_map.items() if name not in stored or stored[name].file.name != file]
    if absent:
        shard = show(index.with_name(weight_map[absent[0]]))
        what = f"tensor '{show(absent[0])}' is missing, though {INDEX} says it is there"
        raise InputError(f"{shard}: {what}{and_more(len(absent) - 1)}", DOWNLOAD_HINT)
    extra = [name for name in stored if name not in weight_map]
    if extra:
        what = f"tensor '{show(extra[0])}' is not listed in {INDEX}"
        raise InputError(f"{show(stored[extra[0]].file)}: {what}{and_more(len(extra) - 1)}", DOWNLOAD_HINT)


def _text_tensors(stored: Mapping[str, Stored], layout: Layout, tied: bool) -> dict[str, Stored]:
    """The text decoder's tensors by canonical name; a name outside the layout stays as it is, to be reported."""
    tensors: dict[str, Stored] = {}
    for name, tensor in stored.items():
        canonical = layout.canonical(name)
        tied_head = tied and canonical == "lm_head.weight"  # some keep a copy; the embeddings count
        if not (tied_head or is_vision(name) or is_buffer(name)):
            tensors[name if canonical is None else canonical] = tensor
    return tensors


def _check_names(
    listing: Path,
    stored: Mapping[str, Stored],
    tensors: Mapping[str, Stored],
    made: Collection[str],
    expected: Mapping[str, Shape],
    layout: Layout,
) -> None:
    missing = [name for name in expected if name not in tensors and name not in made]
    if missing:
        what = f"tensor '{layout.stored(missing[0])}' is missing{and_more(len(missing) - 1)}"
        raise InputError(f"{show(listing)}: {what}", _missing_hint(missing, stored))
    twice = [tensor for name, tensor in tensors.items() if name in made]
    if twice:
        what = f"tensor '{show(twice[0].key)}' is there twice, once quantized{and_more(len(twice) - 1)}"
        raise InputError(f"{show(twice[0].file)}: {what}", DOWNLOAD_HINT)
    unexpected = [tensor for name, tensor in tensors.items() if name not in expected]
    if unexpected:
        what = f"tensor '{show(unexpected[0].key)}' is not one this config has{and_more(len(unexpected) - 1)}"
        raise InputError(f"{show(unexpected[0].file)}: {what}", "compare config.json with the model it came from")


def _missing_hint(missing: list[str], stored: Mapping[str, Stored]) -> str:
    if missing == ["lm_head.weight"]:
        return "if the output layer shares the embeddings, config.json must say tie_word_embeddings: true"
    if any(name.endswith(("_scale", "_scale_inv", "weight_packed", "qweight")) for name in stored):
        return "this looks like a quantized checkpoint, but config.json has no quantization_config that says how"
    return DOWNLOAD_HINT + "; if it is whole, config.json is another model's"


def _check_tensor(tensor: Stored, shape: Shape) -> None:
    where = f"{show(tensor.file)}: tensor '{show(tensor.key)}'"
    if tensor.dims != shape:
        raise InputError(f"{where} has shape {list(tensor.dims)}, config.json makes it {list(shape)}")
    if tensor.dtype not in {DTYPES[name] for name in WEIGHT_DTYPES}:
        found = SAFETENSORS_NAMES[tensor.dtype]
        hint = "weights stored quantized need a quantization_config in config.json that says how"
        raise InputError(f"{where} is {found}, expected one of {', '.join(WEIGHT_DTYPES)}", hint)


def sidecars(path: Path, names: Iterable[str] = SIDECARS) -> tuple[Path, ...]:
    """The files that go into the artifact as they are, checked.

    Args:
        path: The checkpoint's folder.
        names: Those that are looked for.

    Raises:
        InputError: A link would bring in a file from elsewhere, or one is not what it should be.
    """
    present = [path / name for name in names if (path / name).exists() or (path / name).is_symlink()]
    for file in present:
        require_inside(file)
        if file.name != CONFIG:
            check_sidecar(file)
    return tuple(present)
