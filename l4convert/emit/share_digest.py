"""Digest the files that an artifact shares with the checkpoint, and check their weights as those that are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.emit.blocks import count_not_finite, raise_unless_finite
from l4convert.emit.digest import BLOCK_BYTES, RegionDigest
from l4convert.emit.manifest import tensor_entry
from l4convert.emit.plan import PlannedTensor, stored_of
from l4convert.emit.share import link
from l4convert.emit.staging import reported
from l4convert.progress import NO_PROGRESS, Progress, Task
from l4convert.signals import signals_wait

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class SharedFiles:
    """Entries of the manifest for what is shared: of the files, and of the tensors in them, by name."""

    files: Entries
    tensors: Entries


def share_files(
    shared: Sequence[PlannedTensor], folder: Path, threads: int, progress: Progress = NO_PROGRESS
) -> SharedFiles:
    """Put the files of shared tensors into ``folder`` and read each of them once.

    Args:
        shared: The tensors.
        folder: Where the artifact is being made.
        threads: How many files are read at once.
        progress: Told of every byte.

    Raises:
        UsageError, InputError: A file cannot be linked (:func:`link`), changed since its header was read, cannot be
            read, or holds a shared weight that is NaN or infinite.
    """
    if not shared:
        return SharedFiles({}, {})
    by_file: dict[str, list[PlannedTensor]] = {}
    for planned in shared:
        by_file.setdefault(planned.file, []).append(planned)
    for name, tensors in by_file.items():
        stored = stored_of(tensors[0])
        link(stored.file, folder / name)
        stored.require_unchanged()
    sizes = [(folder / name).stat().st_size for name in by_file]
    with progress.task("Checking shared weights", total=sum(sizes), unit="B") as task:
        results = _digest_all([(folder / name, tensors) for name, tensors in by_file.items()], threads, task)
    files = {name: file for name, (file, _) in zip(by_file, results, strict=True)}
    entries = {name: entry for _, tensors in results for name, entry in tensors.items()}
    return SharedFiles(files, {planned.name: entries[planned.name] for planned in shared})


def _digest_all(
    work: Iterable[tuple[Path, list[PlannedTensor]]], threads: int, task: Task
) -> list[tuple[dict[str, Any], Entries]]:
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="share") as executor:
        with signals_wait():
            futures = [executor.submit(_digest, path, tensors, task, stop) for path, tensors in work]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _digest(
    path: Path, tensors: list[PlannedTensor], task: Task, stop: threading.Event
) -> tuple[dict[str, Any], Entries]:
    digests: dict[int, str] = {}
    with reported(f"{stored_of(tensors[0]).file}: cannot be read"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            digest = RegionDigest(descriptor, task)
            for planned in sorted(tensors, key=lambda planned: planned.offset):
                if planned.offset not in digests:  # two may show one tensor of the checkpoint
                    digests[planned.offset] = _region(digest, descriptor, planned, stop)
            size = os.fstat(descriptor).st_size
            file = {"bytes": size, "sha256": digest.whole(size)}
        finally:
            os.close(descriptor)
    return file, {planned.name: _entry(planned, digests[planned.offset]) for planned in tensors}


def _region(digest: RegionDigest, descriptor: int, planned: PlannedTensor, stop: threading.Event) -> str:
    """Digest a tensor, block by block; each is looked at again while the page cache has it."""
    end = planned.offset + planned.nbytes
    digest.begin(planned.offset)
    for start in range(planned.offset, end, BLOCK_BYTES):
        if stop.is_set():
            raise InterruptedError("the run was stopped")
        block = min(BLOCK_BYTES, end - start)
        digest.extend(start + block)
        if count := count_not_finite(os.pread(descriptor, block, start), planned.tensor.dtype):
            raise_unless_finite(planned.tensor, count, block * 8 // planned.tensor.dtype.bitwidth)
    return digest.end()


def _entry(planned: PlannedTensor, sha256: str) -> dict[str, Any]:
    """As that of a written tensor, and where its bytes are: the file, and its name there."""
    return {**tensor_entry(planned, sha256), "file": planned.file, "key": stored_of(planned).key}
