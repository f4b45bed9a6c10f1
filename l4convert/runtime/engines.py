"""The engines of an artifact as its manifest lists them: which there are, which one fits a GPU, are the files whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from l4convert.emit import read_manifest
from l4convert.emit.digest import file_digest
from l4convert.emit.staging import MANIFEST_FILE, reported
from l4convert.emit.write import MODEL_FILE
from l4convert.errors import InputError, UsageError
from l4convert.gpus import Gpu

MODULES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
"""Python module that makes and runs an engine -> what it is called."""

# What the plans of one engine have in common.
_SHARED = ("compute_capability", "builder", "max_batch", "max_context", "profiles", "plugins")
_REBUILD = "Run `l4convert build` again."


@dataclass(frozen=True)
class Profile:
    """An optimization profile: calls of ``least`` to ``most`` new tokens a row."""

    name: str
    least: int
    most: int


@dataclass(frozen=True)
class Tensor:
    """An input or output; ``shape`` has -1 where it differs from call to call."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plugins:
    """The plugin library that an engine was built with, and needs again to run.

    Attributes:
        path: Where it was then.
        sha256: Of the file; ``version``: of the l4convert that made it.
    """

    path: Path
    sha256: str
    version: str


@dataclass(frozen=True)
class EngineFile:
    """One plan: the layers ``first`` to before ``stop``.

    Attributes:
        path: The file; ``nbytes``, ``sha256``: what it should be.
        source_sha256: Of the ``model.onnx`` that it was built from.
        inputs, outputs: Its tensors by name.
    """

    path: Path
    nbytes: int
    sha256: str
    source_sha256: str
    first: int
    stop: int
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Engine:
    """The plans for one hardware profile, which together are the decoder.

    Attributes:
        hardware: Name of the hardware profile it was built for; ``compute_capability``: that one's.
        module: Python module that runs it; ``version``: of the one that made it.
        max_batch: The most sequences; ``max_context``: the most tokens of each.
        profiles: In the order of the plan.
        files: In the order of their layers.
        plugins: What it needs besides TensorRT; None for most.
    """

    hardware: str
    compute_capability: str
    module: str
    version: str
    max_batch: int
    max_context: int
    profiles: tuple[Profile, ...]
    files: tuple[EngineFile, ...]
    plugins: Plugins | None = None


def read_engines(artifact: Path) -> tuple[Engine, ...]:
    """The engines that the manifest lists, in its order.

    Raises:
        InputError: There is none, or the list is damaged, or layers are missing from one.
    """
    manifest = read_manifest(artifact)
    file = artifact / MANIFEST_FILE
    entries = manifest.get("engines") or []
    if not entries:
        raise InputError(f"{artifact}: has no engine", f"Make one: l4convert build {artifact} --target NAME")
    try:
        layers = len(manifest["config"]["layers"])
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            groups.setdefault(str(entry["hardware"]), []).append(entry)
        return tuple(_engine(artifact, name, group, layers) for name, group in groups.items())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{file}: damaged entry of an engine: {error!r}", _REBUILD) from error


def named_engines(engines: Sequence[Engine], hardware: str | None, artifact: Path) -> tuple[Engine, ...]:
    """The engine for a hardware profile, or all of them where none is named.

    Raises:
        UsageError: There is none for it.
    """
    named = tuple(engine for engine in engines if hardware in {None, engine.hardware})
    if not named:
        raise UsageError(
            f"{artifact}: no engine for {hardware!r}; there is one for: {_listed(engines)}",
            f"Make one: l4convert build {artifact} --target {hardware}",
        )
    return named


def choose_engine(engines: Sequence[Engine], gpu: Gpu, artifact: Path) -> Engine:
    """The first of the engines that was built for a GPU's compute capability.

    Raises:
        InputError: None of them was.
    """
    fitting = [engine for engine in engines if engine.compute_capability == gpu.compute_capability]
    if not fitting:
        what = "engine is" if len(engines) == 1 else "engines are"
        raise InputError(
            f"{artifact}: the {what} for {_listed(engines)}, and this GPU ({gpu.name}) has compute capability "
            f"{gpu.compute_capability}",
            f"Make one for it: l4convert build {artifact} --target NAME (`l4convert targets` lists the names)",
        )
    return fitting[0]


def _listed(engines: Sequence[Engine]) -> str:
    return ", ".join(f"{engine.hardware} (compute capability {engine.compute_capability})" for engine in engines)


def check_engine_files(artifact: Path, engine: Engine) -> None:
    """Hold the files against the manifest: size and digest of every plan, and the graph that it was built from.

    Raises:
        InputError: A file is missing, damaged, or was built from another graph than the artifact now has.
    """
    recorded = read_manifest(artifact).get("files", {}).get(MODEL_FILE, {}).get("sha256")
    for plan in engine.files:
        if recorded is not None and plan.source_sha256 != recorded:
            raise InputError(f"{plan.path}: built from another {MODEL_FILE} than the one in {artifact}", _REBUILD)
        if not plan.path.is_file():
            raise InputError(f"{plan.path}: no such file", _REBUILD)
        if (size := plan.path.stat().st_size) != plan.nbytes:
            raise InputError(f"{plan.path}: has {size} bytes, the manifest says {plan.nbytes}", _REBUILD)
        with reported(f"{plan.path}: cannot be read"):
            digest = file_digest(plan.path)[1]
        if digest != plan.sha256:
            raise InputError(f"{plan.path}: its SHA-256 is not that of the manifest", _REBUILD)


def with_plugins(engine: Engine, asked: Path | None) -> Engine:
    """The engine with the plugin library that is to be loaded: the very one that it was built with.

    Args:
        engine: What the manifest says.
        asked: Where the library is now; None: where it was when the engine was built.

    Raises:
        UsageError: One is named, and the engine needs none.
        InputError: It is not there, or is another one.
    """
    needed = engine.plugins
    if needed is None:
        if asked is not None:
            raise UsageError(f"--plugins: the engine for {engine.hardware} has no plugins")
        return engine
    path = (asked or needed.path).resolve()
    if not path.is_file():
        raise InputError(
            f"{path}: there is no plugin library, which the engine for {engine.hardware} was built with",
            "--plugins FILE says where it is now",
        )
    with reported(f"{path}: cannot be read"):
        digest = file_digest(path)[1]
    if digest != needed.sha256:
        raise InputError(
            f"{path}: is not the plugin library that the engine for {engine.hardware} was built with (l4convert "
            f"{needed.version}, SHA-256 {needed.sha256[:12]}...; this one {digest[:12]}...)",
            "--plugins FILE names that one, or `l4convert build` builds the engine again with this one",
        )
    return replace(engine, plugins=replace(needed, path=path))


def _engine(artifact: Path, hardware: str, entries: Sequence[Mapping[str, Any]], layers: int) -> Engine:
    """The engine of one hardware profile; where it was built in several ways, the one of the fewest plans."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        kinds.setdefault(json.dumps([entry.get(key) for key in _SHARED]), []).append(entry)
    reached = 0
    for alike in kinds.values():
        files, reached_now = _chain([_file(artifact, entry) for entry in alike], layers)
        if files:
            return _described(hardware, alike[0], files)
        reached = max(reached, reached_now)
    raise InputError(
        f"{artifact / Path(entries[0]['path']).parent}: no plan begins at layer {reached} of {layers} with the "
        "settings of those before it",
        "Build every segment with the same options: l4convert build with --layers-per-engine.",
    )


def _chain(plans: Sequence[EngineFile], layers: int, start: int = 0) -> tuple[tuple[EngineFile, ...], int]:
    """Plans that follow each other from a layer to the last one, the longest first.

    Returns:
        The plans, none where there are none such, and the layer up to which there are some.
    """
    reached = start
    for plan in sorted((plan for plan in plans if plan.first == start < plan.stop), key=lambda plan: -plan.stop):
        if plan.stop == layers:
            return (plan,), layers
        rest, stop = _chain(plans, layers, plan.stop)
        if rest:
            return (plan, *rest), layers
        reached = max(reached, stop)
    return (), reached


def _described(hardware: str, entry: Mapping[str, Any], files: tuple[EngineFile, ...]) -> Engine:
    module = str(entry["builder"]["name"])
    if module not in MODULES:
        raise ValueError(f"builder is {module!r}")
    profiles = tuple(_profile(profile) for profile in entry["profiles"])
    if not any(profile.least == 1 for profile in profiles):
        raise ValueError("no profile takes one token")
    return Engine(
        hardware=hardware,
        compute_capability=str(entry["compute_capability"]),
        module=module,
        version=str(entry["builder"]["version"]),
        max_batch=int(entry["max_batch"]),
        max_context=int(entry["max_context"]),
        profiles=profiles,
        files=files,
        plugins=_plugins(entry),
    )


def _plugins(entry: Mapping[str, Any]) -> Plugins | None:
    found = entry.get("plugins")
    return None if found is None else Plugins(Path(entry["plugins_path"]), str(found["sha256"]), str(found["version"]))


def _profile(entry: Mapping[str, Any]) -> Profile:
    least, *_, most = entry["tokens"]
    return Profile(str(entry["name"]), int(least), int(most))


def _file(artifact: Path, entry: Mapping[str, Any]) -> EngineFile:
    relative = Path(entry["path"])
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"path is {entry['path']!r}")
    first, stop = entry["layers"]
    return EngineFile(
        path=artifact / relative,
        nbytes=int(entry["bytes"]),
        sha256=str(entry["sha256"]),
        source_sha256=str(entry["source_sha256"]),
        first=int(first),
        stop=int(stop),
        inputs=dict(_tensors(entry["inputs"])),
        outputs=dict(_tensors(entry["outputs"])),
    )


def _tensors(entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        yield str(entry["name"]), Tensor(str(entry["name"]), str(entry["dtype"]), tuple(map(int, entry["shape"])))
