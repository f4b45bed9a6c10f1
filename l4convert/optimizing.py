"""From somebody else's ONNX model to an artifact: read, normalize, quantize, lower, write, compare."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from l4convert.emit import Filling, check_destination, source_digests, write_artifact
from l4convert.emit.memory import parse_size
from l4convert.emit.plan import WeightsPlan, plan_weights
from l4convert.emit.write import MODEL_FILE, manifest_reserve, serialize_model
from l4convert.errors import InputError, L4Error, UsageError, summary_of
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType, record_compute_type
from l4convert.frontend.decoder import OPSET
from l4convert.graph_passes import CANONICAL_PASSES, NORMALIZING_PASSES, Pass, PassReport
from l4convert.onnx_in import OnnxInput, open_onnx
from l4convert.onnx_in.comparing import Comparison, compare_models
from l4convert.planning.disk import plan_disk
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.quantization.recipe import Recipe, load_recipe
from l4convert.targets import TARGETS, Target

#: What the manifest calls the format of such a source.
FORMAT = "onnx"
# Caches of a graph that was exported are the exporter's, and so is their type.
_NOT_RUN = {"quantize_kv_cache"}
# Where a target's caches are buffers that the host holds, a call with a growing past has no lowering.
_NEEDS_GROWING = {"outline_exported_attention"}


@dataclass(frozen=True, kw_only=True)
class OptimizeOptions:
    """What ``l4convert optimize`` is asked for; field by field the options of that command."""

    model: Path
    output: Path
    target: str = "cpu"
    recipe: str = "none"
    block_size: int | None = None
    verify: bool = False
    dry_run: bool = False
    overwrite: bool = False
    restart: bool = False
    jobs: int | None = None
    memory_limit: str | None = None


@dataclass(frozen=True)
class OptimizeResult:
    """What was written, or with ``dry_run`` would be.

    Attributes:
        passes: One report for each pass that ran, in order.
        bytes_before: Of the model and the files beside it that it uses.
        bytes_after: Of graph and weights.
        nodes_before, nodes_after: Nodes of the graph, those of subgraphs included.
        tensors: In the weights file.
        quantized: Tensors that a recipe changed.
        notes: What a user should know that is no failure, a sentence each.
        comparison: With ``verify``: how far outputs are from those of the given model.
        seconds: Wall time.
    """

    model: Path
    output: Path
    target: str
    recipe: str
    compute: str
    passes: tuple[PassReport, ...]
    bytes_before: int
    bytes_after: int
    nodes_before: int
    nodes_after: int
    tensors: int
    quantized: int
    notes: tuple[str, ...]
    comparison: Comparison | None
    seconds: float


def optimize(options: OptimizeOptions, progress: Progress = NO_PROGRESS) -> OptimizeResult:
    """Apply every pass that matches to a model, and write it as an artifact with the same inputs and outputs.

    Raises:
        UsageError: Unknown target or recipe, options that contradict each other, or an output folder that is in use.
        InputError: The model is not usable, is for another type than the target computes in, or the disk is too small.
        CheckFailed: With ``verify``: outputs are not those of the given model, or not finite.
        BackendMissing: With ``verify``: onnxruntime is not installed.
    """
    start = time.monotonic()
    target, recipe = _target(options), _recipe(options)
    check_destination(options.output, options.overwrite, [options.model])
    source = open_onnx(options.model)
    model = source.model
    compute = _compute(model)
    _check_compute(options, target, compute)
    record_compute_type(model.graph, compute)
    names = _interface(model)
    nodes = _count(model)
    reports = tuple(_run(p, options.model, model, recipe, target) for p in passes_for(target))
    _forget_notes(model)
    assert _interface(model) == names  # passes keep inputs and outputs
    plan = plan_weights(model)
    size = plan.total_bytes + len(serialize_model(model, plan))
    comparison = None
    if options.dry_run:
        plan_disk(size + manifest_reserve(plan), options.output).check()
    else:
        _write(options, source, target, recipe, compute, reports, plan, progress)
        if options.verify:
            exact = not any(r.fired for r in reports if r.name in _rounding(target))
            comparison = compare_models(options.model, options.output / MODEL_FILE, compute, exact, progress)
    return OptimizeResult(
        model=options.model,
        output=options.output,
        target=target.name,
        recipe=recipe.name,
        compute=compute,
        passes=reports,
        bytes_before=source.nbytes,
        bytes_after=size,
        nodes_before=nodes,
        nodes_after=_count(model),
        tensors=sum(1 for _ in plan.tensors),
        quantized=sum(r.fired for r in reports if r.name == "quantize_weights"),
        notes=tuple(_notes(model, reports, recipe)),
        comparison=comparison,
        seconds=time.monotonic() - start,
    )


def passes_for(target: Target) -> tuple[Pass, ...]:
    """Those that run for a target, in order."""
    return tuple(p for p in (*NORMALIZING_PASSES, *CANONICAL_PASSES, *target.lowering) if p.name not in _NOT_RUN)


def _rounding(target: Target) -> set[str]:
    return {p.name for p in passes_for(target) if not p.exact}


def _target(options: OptimizeOptions) -> Target:
    if options.target not in TARGETS:
        raise UsageError(f"unknown target {options.target!r}", f"known targets: {', '.join(TARGETS)}")
    if options.verify and options.dry_run:
        raise UsageError("--verify runs what was written, and --dry-run writes nothing", "leave one of them out")
    return TARGETS[options.target]


def _recipe(options: OptimizeOptions) -> Recipe:
    recipe = load_recipe(options.recipe, options.block_size, TARGETS[options.target].block_size)
    if recipe.kv_cache is not None:
        raise UsageError(
            f"recipe {recipe.name} quantizes caches, and those of an exported graph stay as they are",
            "take the [kv_cache] table out, or convert the checkpoint itself",
        )
    if any(rule.scheme.kind == "keep" for rule in recipe.rules):
        raise UsageError(
            f"recipe {recipe.name} keeps the codes of a quantized checkpoint, and an ONNX model is not read for them",
            "give --recipe none, int4, fp8 or a file of your own",
        )
    return recipe


def _compute(model: ir.Model) -> ComputeType:
    """The type that most products give."""
    kinds = Counter(
        node.outputs[0].dtype for node in model.graph if node.op_type in ("MatMul", "Gemm") and node.outputs[0].dtype
    )
    counts = {name: kinds[dtype] for name, dtype in COMPUTE_TYPES.items()}
    return max(counts, key=lambda name: counts[name]) if any(counts.values()) else "float32"


def _check_compute(options: OptimizeOptions, target: Target, compute: ComputeType) -> None:
    if compute not in target.compute:
        able = [name for name, row in TARGETS.items() if compute in row.compute]
        raise InputError(
            f"{options.model}: computes in {compute}, and target {target.name} in {' or '.join(target.compute)}",
            f"give --target {' or '.join(able)}, or export the model in {target.compute[0]}",
        )


def _run(graph_pass: Pass, path: Path, model: ir.Model, recipe: Recipe, target: Target) -> PassReport:
    """Run a pass, where the graph has operators that it can write and the target a use for what it makes."""
    version = model.graph.opset_imports.get("", 0)
    reason = None
    if graph_pass is not NORMALIZING_PASSES[0] and version < OPSET:
        reason = f"it writes operators of opset {OPSET}, and the model stays at {version}"
    elif graph_pass.name in _NEEDS_GROWING and "growing" not in target.kv_caches:
        reason = f"target {target.name} has no kernel for caches that grow, or for none"
    if reason is not None:
        return PassReport(graph_pass.name, 0, (("the graph", reason),))
    try:
        return graph_pass(model, recipe)
    except (L4Error, MemoryError, OSError):
        raise
    except Exception as error:  # anything may stand in a graph that somebody else made
        raise InputError(
            f"{path}: pass {graph_pass.name} cannot read this graph: {type(error).__name__}: {summary_of(error)}",
            "tell the maintainers, with the model's graph if you can; --debug shows where it happens",
        ) from error


def _interface(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    """Names, types and shapes of inputs and outputs."""
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def _count(model: ir.Model) -> int:
    return sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))


def _forget_notes(model: ir.Model) -> None:
    """Take out what an exporter noted at nodes and values: stack traces of the machine it ran on."""
    for name in [name for name in model.graph.metadata_props if name.startswith("pkg.")]:
        del model.graph.metadata_props[name]
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _write(
    options: OptimizeOptions,
    source: OnnxInput,
    target: Target,
    recipe: Recipe,
    compute: str,
    reports: tuple[PassReport, ...],
    plan: WeightsPlan,
    progress: Progress,
) -> None:
    limit = None if options.memory_limit is None else parse_size(options.memory_limit)
    manifest: dict[str, Any] = {
        "source": {"format": FORMAT, "files": source_digests(source.files, progress)},
        "target": target.name,
        "recipe": recipe.to_dict(),
        "compute": compute,
        "calls": "any",
        "passes": [
            {"name": r.name, "fired": r.fired, "skipped": dict(Counter(reason for _, reason in r.skipped))}
            for r in reports
        ],
    }
    write_artifact(
        source.model,
        options.output,
        manifest=manifest,
        overwrite=options.overwrite,
        progress=progress,
        checkpoint=options.model,
        sources=source.files,
        filling=Filling(options.jobs, limit, options.restart),
    )


def _notes(model: ir.Model, reports: tuple[PassReport, ...], recipe: Recipe) -> list[str]:
    """Sentences for what looks like success and may not be what was wanted."""
    fired = {r.name: r.fired for r in reports}
    notes = []
    if recipe.rules and not fired.get("quantize_weights"):
        notes.append(
            f"recipe {recipe.name} quantized nothing: its patterns name no weight that a product takes, such as"
            f" {recipe.rules[0].pattern}; write a recipe with this model's names (`--recipe FILE.toml`)"
        )
    masked = any("mask" in (value.name or "") for value in model.graph.inputs)
    if masked and fired.get("outline_exported_attention"):
        notes.append(
            "tokens that the attention mask leaves out get other logits than before, which mean nothing before or after"
        )
    return notes
