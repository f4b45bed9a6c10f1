"""Engines of an artifact in its manifest: entries, recorded one at a time under a lock, and checked by ``verify``.

Several machines may build engines of one artifact on a shared folder, so every change of the manifest reads it again
while ``engines/.lock`` is held, and replaces it by a rename.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import show
from l4convert.emit.digest import file_digest
from l4convert.emit.manifest import encode_manifest, is_canonical, read_manifest
from l4convert.emit.staging import MANIFEST_FILE, reported, sync
from l4convert.errors import InputError
from l4convert.progress import Task

ENGINES_FOLDER = "engines"
PARTIAL_SUFFIX = ".partial"
TIMING_CACHE = "timing.cache"
_LOCK = ".lock"
_STRAY = {False: "not in the manifest", True: "left by a build that was killed; building it again removes it"}
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PLAN_PATH = re.compile(rf"{ENGINES_FOLDER}/{_PART}/{_PART}\.plan")

Entry = dict[str, Any]


def engine_entries(manifest: Mapping[str, Any]) -> list[Entry]:
    """The well-formed entries of a manifest, by path; later ones of the same path are left out."""
    entries: dict[str, Entry] = {}
    listed = manifest.get(ENGINES_FOLDER, [])
    for entry in listed if isinstance(listed, list) else []:
        if _is_entry(entry):
            entries.setdefault(entry["path"], entry)
    return list(entries.values())


def record_engine(out: Path, entry: Entry) -> None:
    """Add an engine to the manifest, in the place of one with the same path.

    Raises:
        InputError: The manifest cannot be read or written.
    """
    _change(out, lambda entries: {**entries, entry["path"]: entry})


def forget_engine(out: Path, path: str) -> None:
    """Take an engine out of the manifest, before its file is replaced.

    Raises:
        InputError: The manifest cannot be read or written.
    """
    _change(out, lambda entries: {key: value for key, value in entries.items() if key != path})


def _change(out: Path, change: Callable[[dict[str, Entry]], dict[str, Entry]]) -> None:
    folder = out / ENGINES_FOLDER
    with reported(f"{out / MANIFEST_FILE}: cannot be rewritten"), _locked(folder / _LOCK):
        manifest = read_manifest(out)
        if not is_canonical(out / MANIFEST_FILE, manifest):  # to write it again would hide that
            raise InputError(f"{out / MANIFEST_FILE}: was changed after it was written", "run `l4convert verify`")
        entries = change({entry["path"]: entry for entry in engine_entries(manifest)})
        listed = [entries[path] for path in sorted(entries)]
        if manifest.get(ENGINES_FOLDER, []) == listed:
            return
        manifest.pop(ENGINES_FOLDER, None)
        if listed:
            manifest[ENGINES_FOLDER] = listed
        partial = folder / f".{MANIFEST_FILE}{PARTIAL_SUFFIX}"
        partial.write_bytes(encode_manifest(manifest))
        sync(partial)
        partial.replace(out / MANIFEST_FILE)
        sync(out)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, waiting for whoever holds it; it is gone afterwards, so that it is not copied along."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees that it is gone
        os.close(descriptor)


def engine_sizes(out: Path, manifest: Mapping[str, Any]) -> int:
    """Bytes of the plans that will be read by :func:`check_engines`, for a progress bar."""
    return sum(entry["bytes"] for entry in engine_entries(manifest) if _is_regular(out / entry["path"]))


def check_engines(out: Path, manifest: Mapping[str, Any], task: Task) -> list[str]:
    """Compare the folder of engines with the manifest; one line for each problem.

    Logs and timing caches are by-products and may be absent or changed. Nothing is followed out of the folder.
    """
    listed = manifest.get(ENGINES_FOLDER, [])
    entries = {entry["path"]: entry for entry in engine_entries(manifest)}
    problems = []
    if not isinstance(listed, list) or len(entries) != len(listed):
        problems.append(f"{MANIFEST_FILE}: an entry of {ENGINES_FOLDER!r} is malformed or occurs twice")
    present = set(_files(out, problems))
    problems += [f"{path}: is missing" for path in sorted(entries.keys() - present)]
    problems += [
        f"{show(path)}: {_STRAY[path.endswith(PARTIAL_SUFFIX)]}"
        for path in sorted(present - entries.keys())
        if not _by_product(path)
    ]
    for path in sorted(entries.keys() & present):
        problems += _compare(out, path, entries[path], task)
    return problems


def _compare(out: Path, path: str, entry: Entry, task: Task) -> list[str]:
    try:
        size, digest = file_digest(out / path, task)
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    if size != entry["bytes"]:
        return [f"{path}: has {size} bytes, the manifest says {entry['bytes']}"]
    if digest != entry["sha256"]:
        return [f"{path}: its content is not what the manifest says (SHA-256 differs)"]
    return []


def _files(out: Path, problems: list[str]) -> Iterator[str]:
    """Regular files two levels below ``engines``, relative to ``out``; anything else is a problem."""
    folder = out / ENGINES_FOLDER
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            problems.append(f"{ENGINES_FOLDER}: is not a folder")
            return
    except FileNotFoundError:
        return
    for target in sorted(folder.iterdir()):
        name = f"{ENGINES_FOLDER}/{target.name}"
        if not stat.S_ISDIR(target.lstat().st_mode):
            if target.name != _LOCK:
                problems.append(f"{show(name)}: is not a folder of engines")
            continue
        for path in sorted(target.iterdir()):
            if stat.S_ISREG(path.lstat().st_mode):
                yield f"{name}/{path.name}"
            else:
                problems.append(f"{show(f'{name}/{path.name}')}: is not a file of an engine")


def _by_product(path: str) -> bool:
    return path.endswith(".log") or path.rpartition("/")[2] == TIMING_CACHE


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    path, size, digest = (entry.get(key) for key in ("path", "bytes", "sha256"))
    if not isinstance(path, str) or not _PLAN_PATH.fullmatch(path):
        return False
    return type(size) is int and size >= 0 and isinstance(digest, str)
