"""How long a conversion will take, from a short measurement on this machine: an estimate, no promise.

The measurement computes and writes tiles of tensors that have the model's real shapes, recipe and target but random
content, so it goes through the same code as the conversion. Reading the checkpoint from a cold disk is not in it.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.adapters import Merged, is_merged
from l4convert.checkpoint.lazy import TILE_ELEMENTS, Constant, Derived, LazyTensor
from l4convert.checkpoint.prequantized import quantized_parts
from l4convert.emit.jobs import group_jobs
from l4convert.emit.plan import PlannedTensor, WeightsPlan
from l4convert.planning.tensors import SCALES, classify, group_elements
from l4convert.quantization.recipe import Recipe

#: Seconds that the measurement takes, about: a tile that was begun is finished.
SECONDS = 2.0
_SCRATCH_BYTES = 128 << 20
_DIGEST_BYTES = 16 << 20
_SIGMA = 0.02  # of weights, as Llama's are
# Bits of random bytes that are kept: no NaN, no MX scale above 1, no code of one a byte beyond the bits of its scheme.
_SOUND_BITS = {ir.DataType.FLOAT8E4M3FN: 0x77, ir.DataType.UINT8: 0x77, ir.DataType.INT8: 0x07}
_LAYER = re.compile(r"^(model\.layers\.)(\d+)\.")


@dataclass(frozen=True)
class TimePlan:
    """An estimate.

    Attributes:
        elements: Elements of the checkpoint to be read, by what is done to them: the scheme's name, followed by
            ``scales`` for scales that lie apart from their values and are computed by themselves.
        rates: Elements computed and written a second, likewise, measured on one thread.
        jobs: How many threads compute.
        weight_bytes: Bytes of weights, written or shared, digested twice by one thread: for a tensor and for its file.
        digest_rate: Bytes digested a second, measured.
    """

    elements: Mapping[str, int]
    rates: Mapping[str, float]
    jobs: int
    weight_bytes: int
    digest_rate: float

    @property
    def seconds(self) -> float:
        """Of the whole conversion."""
        digests = 2 * self.weight_bytes / self.digest_rate
        work = sum(n / self.rates[work] for work, n in self.elements.items())
        return max(digests, (work + digests) / self.jobs)


class Noise(LazyTensor):
    """A tensor whose every tile is the same normal noise."""

    def __init__(self, name: str, shape: Sequence[int], pool: np.ndarray) -> None:
        super().__init__(ir.DataType.from_numpy(pool.dtype), shape, name=name)
        self._pool = pool

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.name or "",)

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        windows = np.lib.stride_tricks.sliding_window_view(self._pool, width)
        step = min(width, (len(windows) - 1) // max(1, height - 1))  # rows overlap where the pool is too small
        return windows[: step * (height - 1) + 1 : step] if step else windows[[0] * height]


def noise_tensors(shapes: Mapping[str, Sequence[int]], dtype: ir.DataType) -> dict[str, LazyTensor]:
    """Tensors of random content; they share one small array."""
    normal = np.random.default_rng(0).standard_normal(TILE_ELEMENTS, np.float32) * np.float32(_SIGMA)
    pool = normal.astype(dtype.numpy())
    return {name: Noise(name, shape, pool) for name, shape in shapes.items()}


def noise_like(tensor: LazyTensor, plain: LazyTensor) -> LazyTensor:
    """Random content for a weight, stored as ``tensor`` is: quantized with the same kind of codes and scales, or not,
    and with as much to merge.

    Args:
        tensor: Of a checkpoint.
        plain: Random content that is not quantized, for where ``tensor`` is not.
    """
    if isinstance(tensor, Merged):
        return tensor.alike(noise_like(tensor.base, plain), lambda part: noise_tensors({"": part.dims}, part.dtype)[""])
    if next(quantized_parts(tensor), None) is None:
        return plain
    return _with_noise(tensor, np.random.default_rng(0).bytes(TILE_ELEMENTS))


def _with_noise(tensor: LazyTensor, content: bytes) -> LazyTensor:
    """The same combination of random leaves: bits of codes at random, scales alike, and every group in its place."""
    if isinstance(tensor, Derived):
        result = copy.copy(tensor)
        result.parts = tuple(_with_noise(part, content) for part in tensor.parts)
        return result
    dtype = tensor.dtype.numpy()
    scales = tensor.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT)
    if len(tensor.dims) < 2:  # NVFP4 has no scale of 0
        return Constant(np.full(tensor.dims, _SIGMA if scales else 0, dtype))
    if scales:
        pool = np.full(TILE_ELEMENTS, _SIGMA, dtype)
    else:
        pool = (np.frombuffer(content, np.uint8) & _SOUND_BITS.get(tensor.dtype, 0xFF)).view(dtype)
    return Noise(tensor.name or "", tensor.dims, pool)


def estimate_time(plan: WeightsPlan, sample: WeightsPlan, recipe: Recipe, jobs: int, folder: Path | None) -> TimePlan:
    """Measure the schemes of ``plan`` on tensors of ``sample``.

    Args:
        plan: What would be written; none of its tensors is read.
        sample: A plan for the same recipe and target whose tensors have random content (:func:`noise_tensors`).
        recipe: Says which tensors have which scheme.
        jobs: How many threads will compute; no more than there are cores.
        folder: Where to write; nothing is left there. Default: the system's folder for temporary files.

    Raises:
        OSError: Too little disk for the measurement, or the folder cannot be written to.
    """
    elements = _by_work(plan, recipe)
    largest = {_work(group, recipe): group for group in sorted(sample.groups, key=group_elements)}
    anything = max(sample.groups, key=group_elements)  # where the sample's layers have other schemes
    budget = SECONDS / (len(elements) + 0.2)
    with _scratch(folder) as descriptor:
        rates = {work: _rate(largest.get(work, anything), descriptor, budget) for work in elements}
    weights = plan.written_bytes + sum(planned.nbytes for planned in plan.shared)
    return TimePlan(elements, rates, jobs, weights, _digest_rate(budget / 5))


def _by_work(plan: WeightsPlan, recipe: Recipe) -> dict[str, int]:
    elements: dict[str, int] = {}
    for group in plan.groups:
        if number := group_elements(group):
            work = _work(group, recipe)
            elements[work] = elements.get(work, 0) + number
    return elements


def _work(group: Sequence[PlannedTensor], recipe: Recipe) -> str:
    """What is done to a group: its scheme, told apart where scales are computed without their values."""
    kind, scheme = classify(group[0], recipe)
    merged = " of merged weights" if any(is_merged(planned.tensor) for planned in group) else ""
    return (f"{scheme} scales" if kind == SCALES else scheme) + merged


def _rate(group: tuple[PlannedTensor, ...], descriptor: int, budget: float) -> float:
    """Elements a second. The first tile pays for what later ones find warm, so it counts only when it stays alone."""
    start = warm = time.perf_counter()
    total = sum(planned.nbytes for planned in group)
    done = done_warm = steps = 0
    for piece in (piece for job in group_jobs(group, 0) for piece in job.pieces):
        data = piece.compute()
        _write(descriptor, done, data)
        done += len(data)
        now = time.perf_counter()
        if piece.planned is not group[-1] and now - start < 2 * budget:
            continue
        steps += 1
        if steps == 1:
            warm, done_warm = now, done
        if now - start >= budget:
            break
    os.fsync(descriptor)
    if steps > 1:
        done, start = done - done_warm, warm
    return group_elements(group) * done / max(1, total) / max(1e-9, time.perf_counter() - start)


def _write(descriptor: int, offset: int, data: bytes | memoryview) -> None:
    os.pwrite(descriptor, data, offset % _SCRATCH_BYTES)


def _digest_rate(budget: float) -> float:
    data, done, start = bytes(_DIGEST_BYTES), 0, time.perf_counter()
    digest = hashlib.sha256()
    while done == 0 or time.perf_counter() - start < budget:
        digest.update(data)
        done += len(data)
    return done / (time.perf_counter() - start)


@contextmanager
def _scratch(folder: Path | None) -> Iterator[int]:
    """A file without a name: nothing stays, however the process ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        yield file.fileno()


def sample_layers(kinds: Iterable[object]) -> list[int]:
    """The first index of each kind, in order."""
    first: dict[object, int] = {}
    for index, kind in enumerate(kinds):
        first.setdefault(kind, index)
    return sorted(first.values())


def original_name(name: str, layers: Sequence[int]) -> str:
    """A name in a model of some layers, as it was in the model that has them all: the i-th is ``layers[i]`` there."""
    return _LAYER.sub(lambda found: f"{found[1]}{layers[int(found[2])]}.", name)
