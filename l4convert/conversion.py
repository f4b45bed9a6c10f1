"""A conversion before anything is written: options checked, the graph built and lowered, its weights planned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from l4convert.calibrating import Calibration, calibration_of
from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.adapters import merge_adapters
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.names import expected_tensors
from l4convert.checkpoint.presets import preset_checkpoint
from l4convert.emit import check_destination
from l4convert.emit.plan import WeightsPlan, plan_weights
from l4convert.errors import InputError, UsageError
from l4convert.frontend.decoder import build_decoder
from l4convert.graph_passes import CANONICAL_PASSES, Pass, PassReport
from l4convert.options import ConvertOptions, PlanOptions
from l4convert.planning.estimate import noise_like, noise_tensors, original_name, sample_layers
from l4convert.planning.sharing import plan_sharing
from l4convert.progress import Progress
from l4convert.quantization.carry_over import resolve
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.recipe import Recipe, load_recipe, unused_rules, with_kv_cache
from l4convert.runtime.calibration_text import CalibrationText, read_calibration_text
from l4convert.runtime.tokenizer import TextTokenizer
from l4convert.targets import TARGETS, Target
from l4convert.targets.hardware import Hardware, hardware_names, load_hardware


class Conversion:
    """A conversion that was checked and lowered, and of which nothing was written yet.

    Attributes:
        target, hardware: What the artifact is for; hardware only where a plan named it.
        kv_cache, compute: Form of the caches and type of activations, the target's own where none was asked for.
        recipe: How weights and caches are quantized.
        checkpoint: Where weights come from.
        text: What scales of quantized caches are found on, where it was given.
        model: The lowered graph.
        reports: One for each pass that ran.
        plan: The weights file.
        sharing: What stays in files of the checkpoint, where that was asked for.

    Raises:
        UsageError: Options that are unknown, or do not go together.
        InputError: A recipe, text or checkpoint that is not usable.
        CheckFailed: ``verify_passes`` was asked for and a pass changed what the graph computes.
    """

    def __init__(self, options: ConvertOptions | PlanOptions, progress: Progress) -> None:
        self.options = options
        self.target, self.hardware = _target(options)
        self.kv_cache = _choice(self.target, "KV cache", self.target.kv_caches, options.kv_cache)
        self.compute = _choice(self.target, "compute type", self.target.compute, options.compute)
        if options.output is not None:
            sources = [options.checkpoint, *options.adapters] if options.checkpoint is not None else options.adapters
            check_destination(options.output, options.overwrite, sources)
        recipe = load_recipe(options.recipe, options.block_size, self.target.block_size)
        self.recipe = with_kv_cache(recipe, options.kv_dtype, options.kv_granularity, options.kv_layers)
        _check_kv_cache(self.recipe, self.target, options)
        self.checkpoint = _open(options)
        _check_recipe(self.recipe, self.checkpoint)
        self.recipe = resolve(self.recipe, self.checkpoint)
        self.text = _calibration_text(options, self.checkpoint)
        self.model = self.build(self.checkpoint)
        self.reports = tuple(self.run_pass(p, options, progress) for p in self.passes)
        self.plan = plan_weights(self.model, options.share_weights)
        self.sharing = plan_sharing(self.plan, options.output) if options.share_weights else None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that run, in order."""
        return (*CANONICAL_PASSES, *self.target.lowering)

    def build(self, checkpoint: Checkpoint, kv_cache: str | None = None) -> ir.Model:
        """The canonical graph, before any pass."""
        form: Any = kv_cache or self.kv_cache  # both were checked against the target's lists
        compute: Any = self.compute
        return build_decoder(checkpoint.config, checkpoint.tensors, checkpoint.experts, form, compute)

    def calibration(self) -> Calibration | None:
        """How the scales of quantized caches are found; None where there are none.

        Raises:
            UsageError: There is no text to find them on.
        """
        scheme = self.recipe.kv_cache
        if scheme is None:
            return None
        if self.text is None:
            raise UsageError(
                f"caches in {scheme.dtype} need scales, which are found on a text",
                "give --calibration FILE, a text like those that the model will see",
            )
        self._require_quantized(scheme)
        form = "growing" if "growing" in self.target.kv_caches else self.kv_cache
        plain = self.build(self.checkpoint, form)
        recipe = dataclasses.replace(self.recipe, kv_cache=None)
        for graph_pass in self.passes:
            graph_pass(plain, recipe)
        compute: Any = self.compute
        return calibration_of(
            plain,
            config=self.checkpoint.config,
            compute=compute,
            form=form,
            cpu_form=self.compute == "bfloat16" or self.target.name == "cuda",
            share_weights=self.options.share_weights,
            scheme=scheme,
            text=self.text,
            quantized=self.plan,
        )

    def _require_quantized(self, scheme: KvScheme) -> None:
        """Refuse what the pass left alone although the recipe covers it."""
        report = next(report for report in self.reports if report.name == "quantize_kv_cache")
        if report.fired < sum(scheme.covers(layer.chunked) for layer in self.checkpoint.config.layers):
            where, reason = report.skipped[-1]
            raise UsageError(f"{where}: caches cannot be {scheme.dtype}: {reason}", "give another --kv-dtype")

    def sample(self) -> WeightsPlan:
        """The same conversion of one layer of each kind, with random weights."""
        config = self.checkpoint.config
        chosen = sample_layers(layer.moe for layer in config.layers)
        config = dataclasses.replace(config, layers=tuple(config.layers[i] for i in chosen))
        plain: dict[str, LazyTensor] = noise_tensors(
            expected_tensors(config, self.checkpoint.experts), next(iter(self.checkpoint.tensors.values())).dtype
        )
        tensors = {
            name: noise_like(self.checkpoint.tensors[original_name(name, chosen)], noise)
            for name, noise in plain.items()
        }
        checkpoint = dataclasses.replace(self.checkpoint, config=config, tensors=tensors)
        model = self.build(checkpoint)
        for graph_pass in self.passes:
            graph_pass(model, self.recipe)
        return plan_weights(model)

    def run_pass(self, graph_pass: Pass, options: ConvertOptions | PlanOptions, progress: Progress) -> PassReport:
        """Run one pass on the model, and verify it where that was asked for."""
        if not options.verify_passes:
            return graph_pass(self.model, self.recipe)
        from l4convert.graph_passes.verification import Probes, verified

        probes = Probes(self.checkpoint.config, self.kv_cache, self.compute, self.target.calls == "in_place")
        return verified(graph_pass, self.model, self.recipe, probes, progress)


def _open(options: ConvertOptions | PlanOptions) -> Checkpoint:
    preset = options.preset if isinstance(options, PlanOptions) else None
    if (options.checkpoint is None) == (preset is None):
        given = "both were given" if preset is not None else "neither was given"
        raise UsageError(f"a checkpoint or a preset is needed: {given}", "give a folder, or --preset NAME")
    if preset is not None and options.share_weights:
        raise UsageError("a preset has no files in which weights could stay", "plan for a checkpoint")
    if options.checkpoint is not None:
        return merge_adapters(open_checkpoint(options.checkpoint), options.adapters)
    assert preset is not None  # the other one is None
    return merge_adapters(preset_checkpoint(preset), options.adapters)


def _target(options: ConvertOptions | PlanOptions) -> tuple[Target, Hardware | None]:
    """The target, and the hardware where that was named in a plan: then the target is its first runtime."""
    name = options.target
    if name in TARGETS:
        return TARGETS[name], None
    if not isinstance(options, PlanOptions):
        hint = f"known targets: {', '.join(TARGETS)}"
        if name in hardware_names():
            hint = f"{name} is hardware: convert with --target {next(iter(load_hardware(name).runtimes), 'cpu')}"
        raise UsageError(f"unknown target {name!r}", hint)
    if not name.endswith(".toml") and name not in hardware_names():
        known = f"targets: {', '.join(TARGETS)}; hardware: {', '.join(hardware_names())}, or your own FILE.toml"
        raise UsageError(f"unknown target {name!r}", known)
    hardware = load_hardware(name)
    return TARGETS[next(iter(hardware.runtimes), "cpu")], hardware


def _choice(target: Target, kind: str, known: Sequence[str], wanted: str | None) -> str:
    """What was asked for, or the target's default where nothing was."""
    if wanted is None:
        return known[0]
    if wanted not in known:
        raise UsageError(f"target {target.name} has no {wanted!r} {kind}", f"it has: {', '.join(known)}")
    return wanted


def _check_recipe(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Experts are quantized after they were fused, so the names that count are those of stacked ones."""
    unused = unused_rules(recipe, expected_tensors(checkpoint.config, "stacked"))
    if recipe.rules and len(unused) == len(recipe.rules):
        raise InputError(
            f"recipe {recipe.name}: no rule matches any tensor of {checkpoint.title}",
            "patterns are matched against the names of `l4convert inspect CKPT --tensors`, with experts stacked:"
            " ...experts.gate_up_proj and ...experts.down_proj",
        )


def _check_kv_cache(recipe: Recipe, target: Target, options: ConvertOptions | PlanOptions) -> None:
    if recipe.kv_cache is None:
        if isinstance(options, ConvertOptions) and options.calibration is not None:
            raise UsageError(
                "--calibration is for quantized caches, and these are not", "give --kv-dtype, or leave it out"
            )
    elif recipe.kv_cache.dtype not in target.kv_dtypes:
        others = ", ".join(name for name, row in TARGETS.items() if recipe.kv_cache.dtype in row.kv_dtypes)
        taken = f", only of {' and '.join(target.kv_dtypes)}" if target.kv_dtypes else ""
        raise UsageError(
            f"target {target.name} takes no key/value caches of {recipe.kv_cache.dtype}{taken}",
            f"give --kv-dtype {' or '.join((*target.kv_dtypes, 'none'))}, or a target that does: {others}",
        )


def _calibration_text(options: ConvertOptions | PlanOptions, checkpoint: Checkpoint) -> CalibrationText | None:
    if not isinstance(options, ConvertOptions) or options.calibration is None:
        return None
    vocabulary = checkpoint.config.vocab_size
    made = checkpoint.generated.get("tokenizer.json")
    tokenizer = None if made is None else TextTokenizer.parse(made, f"{checkpoint.path}: tokenizer.json")
    return read_calibration_text(
        options.calibration, checkpoint.path, options.calibration_tokens, vocabulary, tokenizer
    )
