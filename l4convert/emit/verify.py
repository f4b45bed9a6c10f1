"""Check an artifact against its own manifest: every byte of every file, and that graph and weights fit together.

Nothing in the folder is trusted: names are never followed out of it, numbers never allocate, text is never executed.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from l4convert.checkpoint.safetensors_file import SAFETENSORS_NAMES, Stored, open_safetensors
from l4convert.checkpoint.text import show
from l4convert.emit.digest import RegionDigest, file_digest
from l4convert.emit.engines import ENGINES_FOLDER, check_engines, engine_entries, engine_sizes
from l4convert.emit.graph_refs import ExternalRef, external_refs
from l4convert.emit.header import stored_as
from l4convert.emit.manifest import is_canonical, read_manifest
from l4convert.emit.plan import FILLER_PREFIX, WEIGHTS_FILE
from l4convert.emit.staging import MANIFEST_FILE, reported
from l4convert.emit.write import MODEL_FILE
from l4convert.errors import InputError
from l4convert.progress import NO_PROGRESS, Progress, Task

# Written into an artifact after its conversion, with checks of their own.
LATER_FILES = {"parity.json"}
LATER_FOLDERS = {ENGINES_FOLDER}

_ESSENTIAL = {MODEL_FILE, WEIGHTS_FILE}
_DTYPES: dict[str, ir.DataType] = {
    dtype.name: dtype for dtype in ir.DataType if dtype not in {ir.DataType.UNDEFINED, ir.DataType.STRING}
}


@dataclass(frozen=True)
class VerifyReport:
    """What was checked and what is wrong; ``problems`` are one line each, naming file and tensor."""

    path: Path
    files: int
    tensors: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON fields, for ``--json``."""
        counts = {"files": self.files, "tensors": self.tensors, "bytes": self.nbytes}
        return {"schema": "l4convert.verify/1", "ok": self.ok, **counts, "problems": list(self.problems)}


def verify_artifact(out: Path, progress: Progress = NO_PROGRESS) -> VerifyReport:
    """Compare every file and tensor of an artifact with its manifest.

    Returns:
        A report; damage of any kind is listed there, not raised.

    Raises:
        InputError: ``out`` is not an artifact at all, or its manifest cannot be read.
    """
    manifest = read_manifest(out)
    files, problems = _entries(manifest, "files", ("bytes", "sha256"))
    tensors, more = _entries(manifest, "tensors", ("dtype", "shape", "nbytes", "sha256"))
    held, others = _by_file(tensors, files)
    problems += more + others
    if not is_canonical(out / MANIFEST_FILE, manifest):
        problems.append(f"{MANIFEST_FILE}: was changed after it was written")
    with reported(f"{out}: cannot be read"):
        present = _present(out, problems)
    problems += [
        f"{show(name)}: not in the manifest" for name in sorted(present.keys() - files.keys() - {MANIFEST_FILE})
    ]
    problems += [f"{show(name)}: is missing" for name in sorted(files.keys() | _ESSENTIAL) if name not in present]
    nbytes = sum(present.values()) + engine_sizes(out, manifest)
    with progress.task("Verifying", total=nbytes, unit="B") as task:
        for name in sorted(files.keys() & present.keys() - held.keys()):
            problems += _check_file(out / name, files[name], present[name], task)
        headers: dict[str, list[Stored]] = {}
        for name in sorted(held.keys() & present.keys()):
            headers[name], more = _check_weights(out / name, files.get(name), held[name], task)
            problems += more
        if {MODEL_FILE, WEIGHTS_FILE} <= present.keys():
            problems += _ref_problems(out, headers)
        with reported(f"{out / ENGINES_FOLDER}: cannot be read"):
            problems += check_engines(out, manifest, task)
    return VerifyReport(out, len(files) + len(engine_entries(manifest)), len(tensors), nbytes, tuple(problems))


def _entries(
    manifest: Mapping[str, Any], field: str, keys: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The well-formed entries of a table of the manifest, and a problem for each other one."""
    table = manifest.get(field)
    if not isinstance(table, dict):
        return {}, [f"{MANIFEST_FILE}: has no table {field!r}"]
    good, problems = {}, []
    for name, entry in table.items():
        if field == "files" and not _is_plain(name):
            problems.append(f"{MANIFEST_FILE}: {show(name)} is not the name of a file of an artifact")
        elif not isinstance(entry, dict) or any(key not in entry for key in keys):
            problems.append(f"{MANIFEST_FILE}: entry {show(name)} of {field!r} is malformed")
        else:
            good[name] = entry
    return good, problems


def _by_file(
    tensors: Mapping[str, dict[str, Any]], files: Mapping[str, Any]
) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """File -> its tensors by name: of the weights file, and of those that are shared with the checkpoint."""
    held: dict[str, dict[str, dict[str, Any]]] = {WEIGHTS_FILE: {}}
    problems = []
    for name, entry in tensors.items():
        file = entry.get("file", WEIGHTS_FILE)
        if isinstance(file, str) and (file == WEIGHTS_FILE or file in files) and isinstance(_key(name, entry), str):
            held.setdefault(file, {})[name] = entry
        else:
            problems.append(f"{MANIFEST_FILE}: entry {show(name)} of 'tensors' is malformed")
    return held, problems


def _key(name: str, entry: Mapping[str, Any]) -> Any:
    """A tensor's name in its file."""
    return entry.get("key", name)


def _is_plain(name: str) -> bool:
    return name not in {"", ".", "..", MANIFEST_FILE} and not any(c in name for c in "/\\\0")


def _present(out: Path, problems: list[str]) -> dict[str, int]:
    """Name -> size of the regular files in the folder; anything unexpected becomes a problem."""
    present: dict[str, int] = {}
    for path in sorted(out.iterdir()):
        try:
            status = path.stat()
        except OSError as error:
            problems.append(f"{show(path.name)}: cannot be read: {error.strerror}")
            continue
        if stat.S_ISREG(status.st_mode):
            if path.name not in LATER_FILES:
                present[path.name] = status.st_size
        elif not (stat.S_ISDIR(status.st_mode) and path.name in LATER_FOLDERS):
            problems.append(f"{show(path.name)}: is not a file of an artifact")
    return present


def _check_file(path: Path, entry: Mapping[str, Any], size: int, task: Task) -> list[str]:
    """A file of the wrong size is not read: it may be a link to something endless, or a terabyte of nothing."""
    if entry["bytes"] != size:
        return _compare(path.name, entry, size, "")
    try:
        return _compare(path.name, entry, *file_digest(path, task))
    except OSError as error:
        return [f"{show(path.name)}: cannot be read: {error}"]


def _compare(name: str, entry: Mapping[str, Any], size: int, digest: str) -> list[str]:
    if entry["bytes"] != size:
        return [f"{show(name)}: has {size} bytes, the manifest says {str(entry['bytes'])[:40]}"]
    if entry["sha256"] != digest:
        return [f"{show(name)}: its content is not what the manifest says (SHA-256 differs)"]
    return []


def _check_weights(
    path: Path, file: Mapping[str, Any] | None, tensors: Mapping[str, Mapping[str, Any]], task: Task
) -> tuple[list[Stored], list[str]]:
    """The header of a file with tensors, and what is wrong with the file."""
    try:
        header = open_safetensors(path)
    except InputError as error:
        return [], [f"{show(path.name)}: {error.message.removeprefix(f'{show(path)}: ')}"]
    where = f"{show(path.name)}: tensor"
    keys = {name: _key(name, entry) for name, entry in tensors.items()}
    problems = [f"{where} {show(name)} is missing" for name, key in keys.items() if key not in header]
    if path.name == WEIGHTS_FILE:  # a file of the checkpoint holds other tensors, too
        stored = [name for name in header if not name.startswith(FILLER_PREFIX)]
        problems += [f"{where} {show(name)} is not in the manifest" for name in stored if name not in tensors]
    problems += [
        f"{where} {show(name)}: dtype or shape is not what the manifest says"
        for name, key in keys.items()
        if key in header and not _agrees(header[key], tensors[name])
    ]
    expected: dict[str, list[tuple[str, Any]]] = {}
    for name, key in keys.items():
        expected.setdefault(key, []).append((name, tensors[name]["sha256"]))
    return list(header.values()), problems + _digest_problems(path, file, expected, header.values(), task)


def _digest_problems(
    path: Path,
    file: Mapping[str, Any] | None,
    expected: Mapping[str, list[tuple[str, Any]]],
    stored: Iterable[Stored],
    task: Task,
) -> list[str]:
    """One pass over a file: the digest of every tensor that is expected (under its name there), and the file's."""
    problems = []
    where = show(path.name)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            digest = RegionDigest(descriptor, task)
            for tensor in stored:
                if tensor.key in expected:
                    actual = digest.region(tensor.offset, tensor.offset + tensor.nbytes)
                    names = [name for name, sha256 in expected[tensor.key] if sha256 != actual]
                    problems += [f"{where}: tensor {show(n)}: SHA-256 differs from the manifest's" for n in names]
            size = os.fstat(descriptor).st_size
            return problems + ([] if file is None else _compare(path.name, file, size, digest.whole(size)))
        finally:
            os.close(descriptor)
    except OSError as error:
        return [*problems, f"{where}: cannot be read: {error}"]


def _agrees(stored: Stored, described: Mapping[str, Any]) -> bool:
    dtype, shape = _DTYPES.get(str(described["dtype"])), described["shape"]
    if dtype is None or not isinstance(shape, list):
        return False
    if not all(type(extent) is int and 0 <= extent < 1 << 63 for extent in shape):
        return False
    return described["nbytes"] == stored.nbytes and _holds(stored, dtype, tuple(shape))


def _holds(stored: Stored, dtype: ir.DataType, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the weights file is where an ONNX tensor of this type and shape would be stored."""
    if math.ceil(math.prod(shape) * dtype.bitwidth / 8) != stored.nbytes:
        return False
    return stored_as(dtype, shape, stored.nbytes) == (SAFETENSORS_NAMES[stored.dtype], stored.dims)


def _ref_problems(out: Path, headers: Mapping[str, Iterable[Stored]]) -> list[str]:
    """A problem for every external tensor of the graph that is not, at its place, such a tensor of one of the files."""
    try:
        refs = list(external_refs(out / MODEL_FILE))
    except (InputError, OSError) as error:
        return [str(error)]
    at = {(name, tensor.offset): tensor for name, header in headers.items() for tensor in header if tensor.nbytes}
    return [
        f"{MODEL_FILE}: tensor {show(ref.name)} does not refer to a tensor of its type and shape in"
        f" {show(ref.location) if ref.location in headers else WEIGHTS_FILE}"
        for ref in refs
        if not _refers(ref, at.get((ref.location, ref.offset)))
    ]


def _refers(ref: ExternalRef, stored: Stored | None) -> bool:
    if stored is None or ref.nbytes != stored.nbytes or ref.dtype.name not in _DTYPES:
        return False
    return _holds(stored, ref.dtype, ref.shape)
