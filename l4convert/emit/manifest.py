"""l4convert.json: what an artifact is made of and where it came from.

The file is canonical (one exact text for one content) and ends with a SHA-256 of itself, so that damage to any byte of
an artifact shows. It holds no time, host name or path: two runs on the same input give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4convert import __version__
from l4convert.checkpoint.remote import known_etag, remote_file
from l4convert.checkpoint.text import parse_object, quote, read_bytes
from l4convert.emit.digest import file_digest
from l4convert.emit.staging import MANIFEST_FILE, reported
from l4convert.errors import InputError
from l4convert.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from l4convert.checkpoint.adapters import AppliedAdapter
    from l4convert.emit.plan import PlannedTensor

SCHEMA = "l4convert.manifest/1"
LIBRARIES = ("ml_dtypes", "numpy", "onnx", "onnx_ir", "safetensors")
MAX_MANIFEST_BYTES = 1 << 28
# Files up to this size are digested whole: configs, indices, tokenizers.
WHOLE_BYTES = 1 << 26
_TAIL_BYTES = 1 << 20
_RESERVED = {"schema", "tool", "libraries", "tensors", "files", "sha256"}


def build_manifest(
    fields: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]], files: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The manifest's content, without its own digest.

    Args:
        fields: What the caller knows: source, recipe, target, kv_cache, passes, config ... (JSON types).
        tensors: Name to dtype, shape, nbytes and sha256, of every tensor in the weights file.
        files: Name to bytes and sha256, of every file but the manifest.
    """
    if taken := _RESERVED & fields.keys():
        raise ValueError(f"manifest fields {sorted(taken)} are written by build_manifest itself")
    return {
        "schema": SCHEMA,
        "tool": {"name": "l4convert", "version": __version__},
        "libraries": {name: version(name) for name in LIBRARIES},
        **fields,
        "tensors": dict(tensors),
        "files": dict(sorted(files.items())),
    }


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a manifest; a digest of everything before it becomes the last field, ``sha256``."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical({**content, "sha256": digest})


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of an artifact folder.

    Raises:
        InputError: ``out`` is not an artifact, its manifest is damaged, or a newer version of this tool wrote it.
    """
    path = out / MANIFEST_FILE
    with reported(f"{path}: cannot be read"):
        if not path.is_file():
            hint = "an artifact is the output folder of `l4convert convert`"
            raise InputError(f"{out}: is not an l4convert artifact (no {MANIFEST_FILE})", hint)
    manifest = parse_object(read_bytes(path, MAX_MANIFEST_BYTES), str(path))
    if (schema := manifest.get("schema")) != SCHEMA:
        raise InputError(f"{path}: its schema is {quote(schema)}; this version reads {SCHEMA!r}", "update l4convert")
    return manifest


def is_canonical(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the file holds exactly what :func:`encode_manifest` writes for its content, its digest included."""
    try:
        return path.read_bytes() == encode_manifest(manifest)
    except (ValueError, RecursionError):  # NaN, lone surrogates, deep nesting: not written by this tool
        return False


def tensor_entry(planned: PlannedTensor, sha256: str) -> dict[str, Any]:
    """What a manifest says of a tensor."""
    dtype = planned.tensor.dtype.name
    return {"dtype": dtype, "shape": list(planned.shape), "nbytes": planned.nbytes, "sha256": sha256}


def source_digests(files: Sequence[Path], progress: Progress = NO_PROGRESS) -> dict[str, dict[str, Any]]:
    """Identify the files of a checkpoint without reading hundreds of gigabytes.

    Files up to 64 MiB (configs, indices, tokenizers) are hashed whole. Of a larger safetensors shard the size and the
    SHA-256 of its header are recorded, of any other larger file the size and the SHA-256 of its last MiB, where the
    zip containers of torch.save keep a CRC-32 of every member. So another layout, dtype or sharding is noticed; a
    change of a large shard's weight bytes alone is not. Hashing everything would take longer than the conversion.

    Of a large file on the hub, or in Hugging Face's cache, the SHA-256 that the hub gives for it is recorded too.

    Returns:
        Path relative to the files' common folder -> ``bytes`` and ``sha256``, ``header_sha256``, ``tail_sha256`` or
        ``git_sha1``.

    Raises:
        InputError: A file cannot be read.
    """
    if not files:
        return {}
    root = os.path.commonpath([path.parent for path in files])
    digests = {}
    with progress.task("Identifying the source", total=len(files), unit="files") as task:
        for path in sorted(files):
            with reported(f"{path}: cannot be read"):
                digests[path.relative_to(root).as_posix()] = _source_digest(path)
            task.advance(1)
    return digests


def adapter_digests(adapter: AppliedAdapter) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of an adapter's files, whole whatever their size.

    Two adapters of one training have the same header: nothing but the weights tells them apart.

    Raises:
        InputError: A file cannot be read.
    """
    digests = {}
    for path in adapter.files:
        with reported(f"{path}: cannot be read"):
            size, digest = file_digest(path)
        digests[path.name] = {"bytes": size, "sha256": digest}
    return digests


def _source_digest(path: Path) -> dict[str, Any]:
    if far := remote_file(path):
        return _digest(far.size, path, far.etag, far.read)
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return {"bytes": size, "sha256": file_digest(path)[1]}
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return _digest(size, path, known_etag(path), read)


def _digest(size: int, path: Path, etag: str | None, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """Of a file that is not hashed whole; the hub knows the SHA-256 of large files, and of others a Git object's."""
    known = {} if etag is None else {"sha256" if len(etag) == 64 else "git_sha1": etag}
    if size <= WHOLE_BYTES and "sha256" in known:
        return {"bytes": size, **known}
    if path.suffix == ".safetensors":
        length = min(int.from_bytes(read(0, 8), "little"), WHOLE_BYTES)
        return {"bytes": size, **known, "header_sha256": hashlib.sha256(read(0, 8 + length)).hexdigest()}
    return {"bytes": size, **known, "tail_sha256": hashlib.sha256(read(max(0, size - _TAIL_BYTES), size)).hexdigest()}


def same_sources(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two results of :func:`source_digests` can be of the same files.

    One made from a server knows the whole file's digest where another knows the header's: what both know must agree.
    """
    return some.keys() == others.keys() and all(
        isinstance(others[name], dict)
        and isinstance(entry, dict)
        and all(others[name][key] == entry[key] for key in entry.keys() & others[name].keys())
        for name, entry in some.items()
    )


def _canonical(content: Mapping[str, Any]) -> bytes:
    """One line a field, and one a tensor, file or engine within their fields, so that diffs are readable."""
    lines = []
    for key, value in content.items():
        if key in {"tensors", "files"} and isinstance(value, dict) and value:
            lines.append(
                f"{_json(key)}: {{\n  {_joined((f'{_json(k)}: {_json(v)}' for k, v in value.items()), '  ')}\n }}"
            )
        elif key == "engines" and isinstance(value, list) and value:
            lines.append(f"{_json(key)}: [\n  {_joined(map(_json, value), '  ')}\n ]")
        else:
            lines.append(f"{_json(key)}: {_json(value)}")
    return f"{{\n {_joined(lines, ' ')}\n}}\n".encode()


def _joined(lines: Iterable[str], indent: str) -> str:
    return f",\n{indent}".join(lines)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
