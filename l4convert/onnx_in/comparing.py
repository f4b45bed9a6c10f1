"""``optimize --verify``: run the given model and what was made of it on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.errors import CheckFailed, InputError
from l4convert.graph_passes.verification import EXACT_TOLERANCES
from l4convert.progress import Progress
from l4convert.runtime.cuda_kernels import has_cuda_kernels
from l4convert.runtime.loading import Loading, load_model, summary
from l4convert.runtime.ort_values import as_float32, ort_value

# Sizes of dimensions that a model leaves open: so many sequences, past tokens and new ones.
_BATCH, _PAST, _NEW, _OTHER = 2, 9, 21, 3
_PADDED = 5
_HINT = "leave --verify out, and compare on inputs of your own"


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the given model's: largest and mean |difference|, and the largest |value|."""

    name: str
    error: float
    mean: float
    largest: float


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        probes: Names of the inputs that were tried.
        outputs: The worst of all probes, for each output.
        tolerance: Most that an error may be, relative to the largest value; None: quantized, so it is only reported.
    """

    probes: tuple[str, ...]
    outputs: tuple[OutputError, ...]
    tolerance: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON fields."""
        rows = [
            {"name": o.name, "max_error": o.error, "mean_error": o.mean, "max_value": o.largest} for o in self.outputs
        ]
        return {"probes": list(self.probes), "tolerance": self.tolerance, "outputs": rows}


def compare_models(given: Path, made: Path, compute: str, exact: bool, progress: Progress) -> Comparison:
    """Run both models on ONNX Runtime, on the CPU.

    Args:
        given: The model that was read.
        made: The model that was written.
        compute: What they compute in.
        exact: Whether nothing was quantized, so that outputs have to agree.
        progress: Told of each run.

    Raises:
        CheckFailed: Outputs differ by more than sums in another order do, or are not finite.
        InputError: The given model does not run on inputs of this kind.
        BackendMissing: onnxruntime is not installed.
    """
    probes = dict(_probes(given))
    with progress.task("Comparing with the given model", total=2, unit="models") as task:
        try:
            before = {name: _run(given, feeds, compute) for name, feeds in probes.items()}
        except InputError as error:
            raise InputError(f"{error.message}", _HINT) from error
        task.advance(1)
        after = {name: _run(made, feeds, compute) for name, feeds in probes.items()}
        task.advance(1)
    tolerance = EXACT_TOLERANCES[compute] if exact else None
    worst: dict[str, OutputError] = {}
    for probe, outputs in before.items():
        for name, expected in outputs.items():
            found = _difference(made, name, probes[probe], expected, after[probe][name])
            if name not in worst or found.error > worst[name].error:
                worst[name] = found
    for found in worst.values():
        if tolerance is not None and found.error > tolerance * max(found.largest, 1.0):
            limit = tolerance * max(found.largest, 1.0)
            how = f"differs from the given model's by {found.error:.3g}, more than {limit:.3g}"
            raise CheckFailed(
                f"{made}: output {found.name} {how}",
                "do not use it; tell the maintainers which model it was made from",
            )
    return Comparison(tuple(probes), tuple(worst.values()), tolerance)


def _run(path: Path, feeds: Mapping[str, np.ndarray], compute: str) -> dict[str, np.ndarray]:
    model = ir.load(path)
    rewrite = compute == "bfloat16" or has_cuda_kernels(model)
    session = load_model(path, Loading(cpu_form=rewrite, fuse_quantized=False))
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run_with_ort_values(names, {name: ort_value(array) for name, array in feeds.items()})
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        raise InputError(f"{path}: does not run on random inputs: {summary(error)}", _HINT) from error
    return {name: as_float32(value) for name, value in zip(names, values, strict=True)}


def _difference(
    path: Path, name: str, feeds: Mapping[str, np.ndarray], expected: np.ndarray, actual: np.ndarray
) -> OutputError:
    """Rows of padding left out: what they hold means nothing."""
    if expected.shape != actual.shape:
        raise CheckFailed(f"{path}: output {name} has shape {actual.shape}, the given model's {expected.shape}", None)
    real = _real_rows(feeds, expected)
    if real is not None:
        expected, actual = expected[real], actual[real]
    if not np.isfinite(actual[np.isfinite(expected)]).all():
        raise CheckFailed(f"{path}: output {name} is not finite", "do not use it")
    both = np.isfinite(expected) & np.isfinite(actual)
    errors = np.abs(actual[both] - expected[both])
    mean = float(errors.mean()) if errors.size else 0.0
    return OutputError(name, float(errors.max(initial=0.0)), mean, float(np.abs(expected[both]).max(initial=0.0)))


def _real_rows(feeds: Mapping[str, np.ndarray], output: np.ndarray) -> np.ndarray | None:
    """Which rows of an output [B,S,...], or of a cache [B,H,T,D], belong to tokens; None where no mask is given."""
    mask = feeds.get("attention_mask")
    if mask is None or mask.all():
        return None
    if output.ndim == 4 and output.shape[2] <= mask.shape[1] and output.shape[0] == mask.shape[0]:
        real = np.broadcast_to(mask[:, None, : output.shape[2]] > 0, output.shape[:3])
        return np.asarray(real)
    if output.ndim >= 2 and output.shape[0] == mask.shape[0] and output.shape[1] <= mask.shape[1]:
        return np.asarray(mask[:, mask.shape[1] - output.shape[1] :] > 0)
    return None


def _probes(path: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Named inputs, always the same ones: all tokens real, and padding in every place."""
    model = ir.load(path)
    rng = np.random.default_rng(0)
    inputs = [x for x in model.graph.inputs if x.name not in model.graph.initializers]
    past = any(len(x.shape or ()) == 4 for x in inputs)
    vocabulary = _vocabulary(model)
    feeds = {str(x.name): _random(rng, x, _sizes(x, past), vocabulary) for x in inputs}
    yield "random tokens", feeds
    mask = feeds.get("attention_mask")
    if mask is not None and mask.ndim == 2 and mask.shape[1] > _PADDED and mask.dtype.kind in "iu":
        padded = mask.copy()
        padded[0, :_PADDED] = 0
        yield "padding in front", {**feeds, "attention_mask": padded}
        padded = mask.copy()
        padded[0, mask.shape[1] // 2] = padded[-1, -2:] = 0
        yield "padding in between and behind", {**feeds, "attention_mask": padded}


def _sizes(value: ir.Value, past: bool) -> list[int]:
    """The size of every axis; those that a model leaves open have the usual meaning for an input of that kind."""
    rank = len(value.shape) if value.shape is not None else 0
    usual = {1: [_NEW], 2: [_BATCH, _NEW], 3: [_BATCH, _NEW, _OTHER], 4: [_BATCH, _OTHER, _PAST, _OTHER]}
    sizes = usual.get(rank, [_OTHER] * rank)
    if rank == 2 and "mask" in str(value.name) and past:
        sizes = [_BATCH, _PAST + _NEW]
    given = list(value.shape) if value.shape is not None else []
    return [extent if isinstance(extent, int) else size for extent, size in zip(given, sizes, strict=True)]


def _random(rng: np.random.Generator, value: ir.Value, sizes: list[int], vocabulary: int) -> np.ndarray:
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    name = str(value.name)
    if "mask" in name or dtype == np.bool_:
        return np.ones(sizes, dtype)
    if "position" in name:
        return np.broadcast_to(np.arange(sizes[-1]), sizes).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, vocabulary, sizes).astype(dtype)
    return rng.standard_normal(sizes).astype(dtype)


def _vocabulary(model: ir.Model) -> int:
    """Rows of the table that tokens are looked up in; 2 where there is none."""
    inputs = set(model.graph.inputs)
    for node in model.graph:
        if node.op_type == "Gather" and len(node.inputs) == 2 and node.inputs[1] in inputs:
            table = node.inputs[0]
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                return table.shape[0]
    return 2
