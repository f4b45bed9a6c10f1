"""Writing valid files from nothing, and damaging them: safetensors, indices, JSON, links."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NAMES = {
    "float16": "F16",
    "float32": "F32",
    "uint16": "BF16",
    "uint8": "F8_E4M3",
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}

Header = dict[str, Any]


def layout(tensors: Mapping[str, np.ndarray]) -> tuple[Header, bytes]:
    """A safetensors header and the data, one tensor after the other."""
    header, parts, end = {}, [], 0
    for name, array in tensors.items():
        data = array.tobytes()
        offsets = [end, end + len(data)]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        parts.append(data)
        end += len(data)
    return header, b"".join(parts)


def write_raw(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file of these parts; ``length`` is what it says of its header, right by default."""
    prefix = struct.pack("<Q", len(header) if length is None else length)
    file.write_bytes(prefix + header + data)


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = layout(tensors)
    write_raw(file, json.dumps(header).encode(), data)


def read_raw(file: Path) -> tuple[Header, bytes]:
    """The header and the data of a valid file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a valid file, writable."""
    header, data = read_raw(file)
    kinds = {name: np.dtype(kind) for kind, name in NAMES.items()}
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(entry["shape"]).copy()
        for name, entry in header.items()
        if name != "__metadata__"
    }


def edit_header(change: Callable[[Header], object], file: str = SINGLE) -> Callable[[Path], None]:
    """Damage: change a header and leave the data."""

    def damage(folder: Path) -> None:
        header, data = read_raw(folder / file)
        change(header)
        write_raw(folder / file, json.dumps(header).encode(), data)

    return damage


def edit_tensor(name: str, change: Callable[[np.ndarray], object], file: str = SINGLE) -> Callable[[Path], None]:
    """Damage: change one tensor in place."""

    def damage(folder: Path) -> None:
        tensors = read_arrays(folder / file)
        change(tensors[name])
        write_safetensors(folder / file, tensors)

    return damage


def edit_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage: change an object of JSON."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def edit_model(file: str, change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    """Damage: change an ONNX model; its external data stays as it is."""

    def damage(folder: Path) -> None:
        proto = onnx.load(folder / file, load_external_data=False)
        change(proto)
        (folder / file).write_bytes(proto.SerializeToString())

    return damage


def text(file: str, content: str | bytes) -> Callable[[Path], object]:
    """Damage: another content."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


def cut(file: str, length: int) -> Callable[[Path], None]:
    """Damage: cut a file, or let it grow by a hole; a negative length is counted from the end."""

    def damage(folder: Path) -> None:
        size = (folder / file).stat().st_size
        os.truncate(folder / file, length if length >= 0 else max(0, size + length))

    return damage


def sparse(file: str, size: int) -> Callable[[Path], None]:
    """Damage: a file of zeros that takes no disk."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).touch()
        os.truncate(folder / file, size)

    return damage


def link(file: str, target: str) -> Callable[[Path], None]:
    """Damage: a link; ``target`` is relative to the input's folder or absolute."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(target)

    return damage


def outside(file: str) -> Callable[[Path], None]:
    """Damage: move a file out of the folder and leave a link to it."""

    def damage(folder: Path) -> None:
        shutil.move(folder / file, folder.parent / "outside" / file)
        (folder / file).symlink_to(f"../outside/{file}")

    return damage


def pipe(file: str) -> Callable[[Path], None]:
    """Damage: a named pipe, from which a reader would wait for ever."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return damage


def folder_instead(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return damage


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def after(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    """One damage after the other."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage
