"""Times of the kernels on real shapes beside their limits and their peers, and what issue 6 asks of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gpu_library import Kernels
from gpu_onnxruntime import NotHere, Session, attention_seconds, cuda_runtime, gqa_model, moe_seconds, qmoe_model
from gpu_peers import ATTN_SCALE, EPS, FLOOR_SCALE, TorchAttention, TorchMoe, can_scale
from gpu_tensors import AttentionTensors, Maker, Weights
from gpu_timing import sets_needed, timed
from gpu_workloads import COPY_FRACTION, FP8_SPEEDUP, MATRIX_FRACTION, AttentionRow, MoeRow, Row
from roofline import Limits

from l4convert.plugins.long_context_attention.definition import AttentionSpec

# Ours and torch's output both carry roundings to bfloat16; with FP8 activations a rounding may also go the other way.
LARGEST_DIFFERENCE = {"bf16": 2e-2, "fp8": 5e-2}
SPARE = 2 << 30  # bytes that are left free for what allocators and libraries take


@dataclass(frozen=True)
class Timed:
    """One row.

    Attributes:
        row: What was to be run.
        seconds, torch_seconds, onnxruntime_seconds: Of one call; None where it was not measured.
        difference: Of our output and torch's, relative; None where there is none to compare.
        problem: Why nothing was measured, or what went wrong.
        failed: Whether ``problem`` is a failure.
        notes: Why a peer was not measured.
    """

    row: Row
    seconds: float | None = None
    torch_seconds: float | None = None
    onnxruntime_seconds: float | None = None
    difference: float | None = None
    problem: str = ""
    failed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """In one line, for those who wait."""
        if self.seconds is None:
            return self.problem
        peers = (("torch", self.torch_seconds), ("ONNX Runtime", self.onnxruntime_seconds))
        others = [f"{name} {seconds * 1e6:,.5g}" for name, seconds in peers if seconds is not None]
        return ", ".join([f"{self.seconds * 1e6:,.5g} us", *others, *self.notes])

    @property
    def passed(self) -> bool:
        """Nothing went wrong; the row need not have been measured."""
        within = self.difference is None or self.difference <= LARGEST_DIFFERENCE[self.row.work.rate]
        return within and not self.failed


def aims(result: Timed, limits: Limits, others: Mapping[str, Timed]) -> dict[str, bool | None]:
    """What is asked of a row -> met, not met, or None where its bytes alone take too long for it.

    Args:
        result: The row, measured.
        limits: Of the machine.
        others: All rows by name.
    """
    row, seconds = result.row, result.seconds
    if seconds is None:
        return {}
    work, found = row.work, {}
    if row.decodes:
        found[f"{COPY_FRACTION:.0%} of copy"] = work.moved / seconds / limits.bandwidth >= COPY_FRACTION
    elif isinstance(row, MoeRow) and row.plain:
        plain = others[row.plain].seconds if row.plain in others else None
        if plain is not None:
            found[f"{FP8_SPEEDUP:g} x 16-bit"] = plain / seconds >= FP8_SPEEDUP
    elif row.decodes is False and work.rate == "bf16" and work.matrix_seconds(limits):
        reachable = work.matrix_seconds(limits) / work.seconds(limits) >= MATRIX_FRACTION
        met = work.matrix_seconds(limits) / seconds >= MATRIX_FRACTION
        found[f"{MATRIX_FRACTION:.0%} of matrix"] = met if met or reachable else None
    if result.torch_seconds is not None:
        found["not slower than torch"] = seconds <= result.torch_seconds
    return found


class Bench:
    """Measures rows, one after the other; the weights of a layer are made once for all of its rows."""

    def __init__(self, torch: Any, kernels: Kernels, limits: Limits, memory: int, cache: int) -> None:
        """``memory``, ``cache``: bytes of the device, and of its L2 cache."""
        self.torch, self.kernels, self.limits = torch, kernels, limits
        self.memory, self.cache = memory, cache
        self.maker = Maker(torch, kernels.device)
        self.scales_fp8 = can_scale(torch, kernels.device)
        self._layer: tuple[Any, Weights, TorchMoe, Session | str] | None = None

    def measured(self, rows: Iterable[Row], say: Callable[[str], None]) -> Iterator[Timed]:
        """Every row; whatever goes wrong in one is its own problem and not that of the others."""
        for row in rows:
            say(f"... {row.name}")
            result = self._guarded(row)
            say(f"    {result.summary}")
            yield result

    def _guarded(self, row: Row) -> Timed:
        torch = self.torch
        if row.memory + SPARE > self.memory:
            return Timed(row, problem=f"not measured: needs {(row.memory + SPARE) / 1e9:.0f} GB")
        if isinstance(row, MoeRow) and row.experts.weights == "fp8" and self.kernels.sm < 89:
            return Timed(row, problem="not measured: FP8 products need SM 89")
        try:
            return self._moe(row) if isinstance(row, MoeRow) else self._attention(row)
        except torch.cuda.OutOfMemoryError:
            self._layer = None
            return Timed(row, problem=f"not measured: out of memory; needs about {row.memory / 1e9:.0f} GB")
        except Exception as error:  # the table is to have every row
            return Timed(row, problem=f"failed: {type(error).__name__}: {one_line(error)}", failed=True)
        finally:
            with contextlib.suppress(RuntimeError):  # after a kernel that faulted, every call fails
                torch.cuda.empty_cache()

    def _moe(self, row: MoeRow) -> Timed:
        torch = self.torch
        weights, peer, session = self._of_layer(row)
        chosen = [row.chosen()]
        distinct = len(np.unique(chosen[0]))
        fitting = max(1, row.experts.num_experts // distinct)  # other sets of buffers are other experts
        for number in range(1, min(fitting, sets_needed(row.work.moved, self.cache))):
            chosen.append((chosen[0] + number * distinct) % row.experts.num_experts)
        sets = [self.maker.routed(row.experts, weights, one) for one in chosen]
        estimate = row.work.seconds(self.limits)
        ours = [self.kernels.moe(row.experts, "bfloat16", tensors) for tensors in sets]
        result = Timed(row, timed(torch, ours, estimate))

        def in_torch() -> tuple[float | None, float]:
            calls = [peer.call(tensors, one) for tensors, one in zip(sets, chosen, strict=True)]
            return relative(torch, sets[0].y, calls[0]()), timed(torch, calls, estimate)

        result = self._with_torch(result, in_torch)
        return self._with_onnxruntime(result, session, lambda open_: moe_seconds(open_, sets[0]))

    def _of_layer(self, row: MoeRow) -> tuple[Weights, TorchMoe, Session | str]:
        if self._layer is None or self._layer[0] != row.experts:
            self._layer = None  # let go of the old weights before there are new ones
            self.torch.cuda.empty_cache()
            weights = self.maker.weights(row.experts)
            peer = TorchMoe(self.torch, row.experts, weights, self.scales_fp8)
            self._layer = (row.experts, weights, peer, self._session(lambda: qmoe_model(row.experts)))
        return self._layer[1:]

    def _attention(self, row: AttentionRow) -> Timed:
        torch, layer = self.torch, row.attention
        self._layer = None
        sets = [self._attended(row) for _ in range(sets_needed(row.work.moved, self.cache))]
        estimate, spec = row.work.seconds(self.limits), spec_of(row)
        ours = [self.kernels.attention(spec, tensors) for tensors in sets]
        result = Timed(row, timed(torch, ours, estimate))

        def in_torch() -> tuple[float | None, float]:
            peers = [TorchAttention(torch, layer, tensors, row.new, row.context) for tensors in sets]
            difference = None
            if peers[0].comparable:
                difference = relative(torch, sets[0].attention.view(-1), peers[0].call().reshape(-1))
            return difference, timed(torch, [peer.call for peer in peers], estimate)

        result = self._with_torch(result, in_torch)
        session = self._session(lambda: gqa_model(layer))
        return self._with_onnxruntime(
            result, session, lambda open_: attention_seconds(open_, sets[0], layer, row.new, row.context)
        )

    def _attended(self, row: AttentionRow) -> AttentionTensors:
        positions = np.tile(np.arange(row.context), (row.batch, 1))
        return self.maker.attended(row.attention, positions, row.new, row.slots)

    def _session(self, model: Callable[[], Any]) -> Session | str:
        """ONNX Runtime with a model, or why there is none."""
        try:
            cuda_runtime()  # before a model of gigabytes is made for nothing
            return Session(self.torch, model())
        except NotHere as reason:
            return str(reason)
        except Exception as error:  # likewise
            return one_line(error)

    def _with_torch(self, result: Timed, run: Callable[[], tuple[float | None, float]]) -> Timed:
        """With torch's difference and time; what torch cannot do is a note."""
        try:
            difference, seconds = run()
        except Exception as error:  # a peer that fails is no failure of ours
            return replace(result, notes=(f"torch: {one_line(error)}",))
        return replace(result, difference=difference, torch_seconds=seconds)

    def _with_onnxruntime(self, result: Timed, session: Session | str, run: Callable[[Session], float]) -> Timed:
        if isinstance(session, str):
            return replace(result, notes=(*result.notes, f"onnxruntime: {session}"))
        try:
            return replace(result, onnxruntime_seconds=run(session))
        except Exception as error:  # likewise
            return replace(result, notes=(*result.notes, f"onnxruntime: {one_line(error)}"))


def spec_of(row: AttentionRow) -> AttentionSpec:
    """The op's attributes in Scout."""
    layer = row.attention
    chunked = bool(layer.chunk_size)
    return AttentionSpec(
        layer.num_heads, layer.kv_num_heads, layer.head_dim, layer.chunk_size, chunked, EPS if chunked else 0.0,
        FLOOR_SCALE, 0.0 if chunked else ATTN_SCALE, "static", "bfloat16", layer.kv,  # type: ignore[arg-type]
    )  # fmt: skip


def one_line(error: Exception) -> str:
    """The beginning of what it says."""
    return " ".join(str(error).split())[:300]


def relative(torch: Any, actual: Any, expected: Any) -> float:
    """``|actual - expected| / |expected|`` on the device; NaN where something was not written."""
    expected = expected.float()
    return float(torch.linalg.vector_norm(actual.float() - expected) / torch.linalg.vector_norm(expected))
