"""Write an artifact: plan, check, fill the weights, then everything around them, then one rename."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from l4convert.emit.blocks import check_finite
from l4convert.emit.digest import BLOCK_BYTES, file_digest
from l4convert.emit.fill import Filling, write_weights
from l4convert.emit.identity import identify
from l4convert.emit.manifest import build_manifest, encode_manifest
from l4convert.emit.plan import WEIGHTS_FILE, WeightsPlan, plan_weights
from l4convert.emit.resume import continued, open_journal
from l4convert.emit.share import SHARED_PREFIX
from l4convert.emit.share_digest import share_files
from l4convert.emit.staging import (
    MANIFEST_FILE,
    allocated_bytes,
    check_destination,
    check_free_disk,
    reported,
    staged,
)
from l4convert.progress import NO_PROGRESS, Progress

MODEL_FILE = "model.onnx"
# The manifest's size is not known beforehand; this covers its fields, and a line for each tensor.
_MANIFEST_BYTES = 1 << 20
_MANIFEST_LINE_BYTES = 400


def write_artifact(
    model: ir.Model,
    out: Path,
    *,
    sidecars: Sequence[Path] = (),
    extra_files: Mapping[str, str | bytes] | None = None,
    manifest: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    share_weights: bool = False,
    progress: Progress = NO_PROGRESS,
    checkpoint: Path | None = None,
    keep_clear_of: Sequence[Path] = (),
    sources: Sequence[Path] = (),
    filling: Filling | None = None,
    on_resumed: Callable[[int], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``model`` and its weights as a folder that appears whole or not at all.

    A run that was stopped after it had written some weights (killed, interrupted, full disk, failing disk) leaves them
    beside ``out``; calling this again with the same arguments goes on from there and ends with the same bytes.

    Args:
        model: Its initializers are lazy tensors, or small ones in memory. It is the same afterwards.
        out: The folder to make; missing parents are made too.
        sidecars: Files copied into it under their own names (tokenizer, config).
        extra_files: Name to content of further files; they win over sidecars of the same name.
        manifest: JSON fields for the manifest, beside those that this function knows (:func:`build_manifest`).
        overwrite: Replace an artifact, or an empty folder, that is there already.
        share_weights: Leave weights that need no change in the checkpoint's own files, which are linked, not copied.
        progress: Told of every byte of the weights file.
        checkpoint: The source folder, outside which ``out`` must lie; default: the sidecars' folders.
        keep_clear_of: Further folders outside of which ``out`` must lie.
        sources: Files that the weights come from; if one changed, what an earlier run left is not continued.
        filling: Threads and memory, and whether to discard what an earlier run left.
        on_resumed: Called at the end with how many bytes of weights an earlier run had written.
        finish: Called with the folder when all weights are in it and before anything else is. It may set values of
            ``model`` that are stored in the graph, but not their sizes, and leaves no files behind. It runs anew in
            every run that goes on from an earlier one.

    Returns:
        The absolute path of the artifact.

    Raises:
        UsageError: ``out`` exists, is no place for an artifact, or another process is writing it; what an earlier run
            left is of other options; the memory limit is too small; the weights cannot be shared.
        InputError: What an earlier run left is of another source; too little free disk, an unreadable source, a weight
            that is NaN or infinite, or a failing disk.
    """
    out = Path(os.path.realpath(out))
    folders = [path.parent for path in sidecars] if checkpoint is None else [checkpoint]
    check_destination(out, overwrite, list(dict.fromkeys([*folders, *keep_clear_of])))
    plan = plan_weights(model, share_weights)
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in (extra_files or {}).items()}
    copies = {path.name: path for path in sidecars if path.name not in contents}
    _check_names([*contents, *copies])
    contents[MODEL_FILE] = serialize_model(model, plan)
    filling = filling or Filling()
    facts = identify(plan, contents, {"share-weights": share_weights, **(manifest or {})}, sources)
    with staged(out, overwrite) as staging:
        folder, path = staging.folder, staging.folder / WEIGHTS_FILE
        with open_journal(staging, plan, facts, filling.restart) as journal:
            needed = _needed_bytes(plan, contents.values(), copies.values())
            check_free_disk(folder, needed - allocated_bytes(path))
            with continued(staging, journal):
                shared = share_files(plan.shared, folder, filling.threads, progress)
                filled = write_weights(path, plan, progress, filling, journal)
                if finish is not None:
                    finish(folder)
                    contents[MODEL_FILE] = serialize_model(model, plan)
                files = {WEIGHTS_FILE: filled.file, **shared.files}
                files |= {name: _write(folder / name, [content]) for name, content in contents.items()}
                files |= {name: _write(folder / name, _blocks(source)) for name, source in copies.items()}
                tensors = filled.tensors | shared.tensors
                _write(folder / MANIFEST_FILE, [encode_manifest(build_manifest(manifest or {}, tensors, files))])
                with reported(f"{out}: cannot be put in place"):
                    staging.publish()
    if on_resumed is not None:
        on_resumed(filled.resumed_bytes)
    return out


def serialize_model(model: ir.Model, plan: WeightsPlan) -> bytes:
    """The bytes of model.onnx: planned initializers refer to the file that has their bytes, the others are inline.

    Raises:
        InputError: An inline weight is NaN or infinite.
    """
    with _external(plan):
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    check_finite(value.const_value)
        return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@contextmanager
def _external(plan: WeightsPlan) -> Iterator[None]:
    """Let every planned initializer refer to its file while the context lasts."""
    external = [*plan.tensors, *plan.shared]
    for planned in external:
        for value in planned.values:
            value.const_value = ir.ExternalTensor(
                planned.file,
                planned.offset,
                planned.nbytes,
                planned.tensor.dtype,
                shape=ir.Shape(planned.shape),
                name=value.name or planned.name,
            )
    try:
        yield
    finally:
        for planned in external:
            for value in planned.values:
                value.const_value = planned.tensor


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        reserved = {MODEL_FILE, WEIGHTS_FILE, MANIFEST_FILE, "", ".", ".."}
        if name in reserved or "/" in name or name.startswith(SHARED_PREFIX):
            raise ValueError(f"{name!r} cannot be the name of a further file of an artifact")


def _needed_bytes(plan: WeightsPlan, contents: Iterable[bytes], copies: Iterable[Path]) -> int:
    copied = 0
    for source in copies:
        with reported(f"{source}: cannot be read"):
            copied += source.stat().st_size
    return plan.total_bytes + sum(map(len, contents)) + copied + manifest_reserve(plan)


def manifest_reserve(plan: WeightsPlan) -> int:
    """Bytes of disk that are kept for the manifest."""
    return _MANIFEST_BYTES + _MANIFEST_LINE_BYTES * len([*plan.tensors, *plan.shared])


def _blocks(source: Path) -> Iterator[bytes]:
    """The content of a file; a failing source is told apart from a failing destination."""
    with reported(f"{source}: cannot be read"), source.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _write(path: Path, blocks: Iterable[bytes]) -> dict[str, Any]:
    """Write a file; returns its entry in the manifest."""
    with reported(f"{path.name}: cannot be written"):
        with path.open("wb") as file:
            for block in blocks:
                file.write(block)
        size, digest = file_digest(path)
    return {"bytes": size, "sha256": digest}
