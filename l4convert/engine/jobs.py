"""What a run of ``build`` will do: one job for each engine, everything checked before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit import read_manifest
from l4convert.emit.digest import file_digest
from l4convert.emit.engines import ENGINES_FOLDER
from l4convert.emit.graph_refs import external_refs
from l4convert.emit.staging import reported
from l4convert.emit.write import MODEL_FILE
from l4convert.engine import checks
from l4convert.engine.memory import build_bytes, require_memory
from l4convert.engine.network import (
    Capacity,
    GraphFacts,
    graph_facts,
    is_cache,
    load_graph,
    set_capacity,
    tensor_bytes,
    with_plugin_nodes,
)
from l4convert.engine.plugins import PluginLibrary, find_library, require_kernels
from l4convert.engine.segments import Span, cut, split_layers
from l4convert.engine.shapes import TokenProfile, input_shapes, io_table, token_profiles
from l4convert.errors import UsageError
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.targets.hardware import Hardware, load_hardware

DEFAULT_CONTEXT = 8192
DEFAULT_PREFILL = 512


@dataclass(frozen=True)
class BuildOptions:
    """What ``l4convert build`` is asked for.

    Attributes:
        artifact: Folder that ``convert`` wrote.
        targets: Names of hardware profiles, or paths of own ones.
        max_batch: Sequences of a call.
        max_context: Tokens that a sequence may have; None: 8192, or what the model takes if that is less.
        prefill_tokens: New tokens of a call at most.
        layers_per_engine: Cut into segments of that many layers; None: one engine.
        segments: Indices of the segments to build; None: all.
        memory_limit: Most memory to use, as "20G"; None: what the machine has free.
        overwrite: Build again what is built already.
        check_segments: Run the segments in ONNX Runtime and compare with the whole graph before building.
        plugins: The plugin library, for artifacts of the target tensorrt; None: where it is built.
    """

    artifact: Path
    targets: tuple[str, ...]
    max_batch: int = 1
    max_context: int | None = None
    prefill_tokens: int = DEFAULT_PREFILL
    layers_per_engine: int | None = None
    segments: tuple[int, ...] | None = None
    memory_limit: str | None = None
    overwrite: bool = False
    check_segments: bool = True
    plugins: Path | None = None


@dataclass(frozen=True)
class EngineJob:
    """One engine to build.

    Attributes:
        path: Of the plan, relative to the artifact.
        model: What the builder gets.
        memory_bytes: Estimated peak memory of building it.
        caches_bytes: Of all its key/value caches, at the largest batch.
        inputs: The entry of the manifest as far as it is known before building: an engine whose entry agrees is built.
        plugins: The library of its plugins; None where it has none.
    """

    path: str
    hardware: Hardware
    span: Span
    model: onnx.ModelProto
    facts: GraphFacts
    profiles: tuple[TokenProfile, ...]
    max_batch: int
    capacity: Capacity
    memory_bytes: int
    caches_bytes: int
    inputs: dict[str, Any]
    plugins: PluginLibrary | None = None

    @property
    def title(self) -> str:
        """How messages and progress name it."""
        return f"{self.hardware.name} {self.span.name}"

    def shapes(self) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
        """Least, usual and most shape of each input, for each optimization profile."""
        values = list(self.model.graph.input)
        return [dict(input_shapes(values, profile, self.max_batch, self.capacity)) for profile in self.profiles]


@dataclass(frozen=True)
class BuildPlan:
    """All jobs of a run.

    Attributes:
        out: The artifact.
        target: What it was converted for; decides the builder.
        whole: The graph of all layers, with its caches' lengths set.
        segments: The graphs that it is cut into, all of them, in order; one where it is not cut. Both have the
            definitions of our own operators, so that ONNX Runtime can run them.
    """

    out: Path
    target: str
    config: DecoderConfig
    whole: onnx.ModelProto
    segments: tuple[onnx.ModelProto, ...]
    jobs: tuple[EngineJob, ...]


def plan_build(options: BuildOptions) -> BuildPlan:
    """Check everything that can be checked without building.

    Raises:
        UsageError: The options contradict each other, the artifact or the hardware.
        InputError: The artifact or a profile is damaged; the machine has too little memory.
    """
    info = read_artifact(options.artifact)
    checks.require_engine_target(options.artifact, info.target)
    hardware = _hardware(options.targets, info.target)
    capacity = _capacity(info, options)
    spans = split_layers(len(info.config.layers), options.layers_per_engine)
    chosen = _chosen(options.segments, len(spans))
    source = _source(options.artifact)
    model = load_graph(options.artifact / MODEL_FILE)
    set_capacity(model, capacity)
    segments = cut(model, spans)
    parsed = [with_plugin_nodes(segment) for segment in segments] if info.target == "tensorrt" else segments
    library = _library(options, info, parsed, hardware)
    jobs = [
        _job(options, target, spans[i], parsed[i], capacity, source, library) for target in hardware for i in chosen
    ]
    for job in jobs:
        checks.require_precisions(job.hardware, job.facts)
        checks.require_gpu_memory(job.hardware, job.facts.weights_bytes, job.caches_bytes, job.span.name)
        require_memory(job.memory_bytes, job.title, options.memory_limit, job.span.stop - job.span.start)
    return BuildPlan(options.artifact, info.target, info.config, model, tuple(segments), tuple(jobs))


def _hardware(names: Sequence[str], target: str) -> list[Hardware]:
    loaded: dict[str, Hardware] = {}
    for text in names:
        hardware = load_hardware(text)
        if loaded.setdefault(hardware.name, hardware) != hardware:
            raise UsageError(f"two profiles are called {hardware.name}", "rename one of the files")
        checks.require_runtime(hardware, target)
    return list(loaded.values())


def _library(
    options: BuildOptions, info: ArtifactInfo, parsed: Sequence[onnx.ModelProto], hardware: Sequence[Hardware]
) -> PluginLibrary | None:
    """The plugin library, which has the kernels for every one of the GPUs."""
    if info.target != "tensorrt":
        if options.plugins is not None:
            raise UsageError(f"--plugins: the artifact is for {info.target}, whose engines have no plugins")
        return None
    library = find_library(options.plugins, parsed)
    if library is not None:
        for target in hardware:
            require_kernels(library, target, parsed)
    return library


def _capacity(info: ArtifactInfo, options: BuildOptions) -> Capacity:
    config, asked = info.config, options.max_context
    limit = config.max_position_embeddings
    if asked is not None and not 1 <= asked <= limit:
        raise UsageError(f"--max-context {asked} is not from 1 to the model's {limit} positions")
    for name, value in (("--max-batch", options.max_batch), ("--prefill-tokens", options.prefill_tokens)):
        if value < 1:
            raise UsageError(f"{name} {value} is not above 0")
    context = min(limit, DEFAULT_CONTEXT) if asked is None else asked
    return Capacity(context, min(config.attention_chunk_size, context))


def _chosen(segments: tuple[int, ...] | None, count: int) -> list[int]:
    if segments is None:
        return list(range(count))
    if wrong := [i for i in segments if not 0 <= i < count]:
        raise UsageError(f"--segments: there is no segment {wrong[0]}; the last one is {count - 1}")
    return sorted(set(segments))


def _source(out: Path) -> dict[str, Any]:
    """What an engine was made of: digests of the graph and of the files with its weights."""
    manifest = read_manifest(out)
    path = out / MODEL_FILE
    with reported(f"{path}: cannot be read"):
        digest = file_digest(path)[1]
        checks.require_same_graph(path, digest, manifest)
        files = sorted({ref.location for ref in external_refs(path)})
    weights = {name: manifest["files"].get(name, {}).get("sha256") for name in files}
    return {"source_sha256": digest, "weights_sha256": weights}


def _job(
    options: BuildOptions,
    hardware: Hardware,
    span: Span,
    model: onnx.ModelProto,
    capacity: Capacity,
    source: dict[str, Any],
    library: PluginLibrary | None,
) -> EngineJob:
    facts = graph_facts(model)
    profiles = token_profiles(options.prefill_tokens, capacity)
    path = f"{ENGINES_FOLDER}/{hardware.name}/{span.name}.plan"
    inputs, outputs = list(model.graph.input), list(model.graph.output)
    largest = input_shapes(inputs, profiles[0], options.max_batch, capacity)
    return EngineJob(
        path=path,
        hardware=hardware,
        span=span,
        model=model,
        facts=facts,
        profiles=profiles,
        max_batch=options.max_batch,
        capacity=capacity,
        memory_bytes=build_bytes(facts),
        caches_bytes=sum(tensor_bytes(value, largest[value.name][2]) for value in inputs if is_cache(value.name)),
        inputs={
            "path": path,
            "hardware": hardware.name,
            "compute_capability": hardware.compute_capability,
            "layers": [span.start, span.stop],
            "max_batch": options.max_batch,
            "max_context": capacity.global_layers,
            "capacity": capacity.as_dict(),
            "profiles": [profile.as_dict() for profile in profiles],
            "inputs": io_table(inputs),
            "outputs": io_table(outputs),
            **source,
            **({} if library is None else {"plugins": library.as_dict()}),
        },
        plugins=library,
    )
