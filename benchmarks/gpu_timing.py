"""Times of work on the GPU, and the limits of the GPU itself, with torch.

Work is recorded as a CUDA graph and replayed: launches are paid once a replay, not once a call. A graph goes through
several sets of buffers, together larger than the L2 cache, so that every call finds its inputs in memory and not in
the cache. The time is the median of many replays between two CUDA events, over the calls of a replay.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from roofline import Limits

COLD = 4  # a graph's sets of buffers are this many times the L2 cache
LEAST_SECONDS = 1e-3  # of a replay, so that its own launch does not count
MOST_CALLS, MOST_SETS = 64, 64
REPLAYS, WARM = 21, 3
# Numbers of the copies and of the square products that limits are measured with: far above the cache, below any GPU's
# memory, and large enough that more does not change the rate.
COPY_BYTES = 2 << 30
SQUARE = 8192

Call = Callable[[], object]


def sets_needed(moved: int, cache: int) -> int:
    """Sets of buffers of ``moved`` bytes that together are :data:`COLD` times the cache."""
    return min(MOST_SETS, max(1, math.ceil(COLD * cache / max(moved, 1))))


def calls_needed(sets: int, seconds: float) -> int:
    """Calls in a graph: a multiple of the sets, about :data:`LEAST_SECONDS` by the estimate of one call."""
    wanted = min(MOST_CALLS, max(1, math.ceil(LEAST_SECONDS / max(seconds, 1e-9))))
    return sets * math.ceil(wanted / sets)


def timed(torch: Any, calls: Sequence[Call], estimate: float) -> float:
    """Seconds of one call, the median of :data:`REPLAYS` replays.

    Args:
        torch: The module.
        calls: The same call on different sets of buffers; each puts work on torch's current stream.
        estimate: Seconds of one, about.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries pick their algorithms and load their kernels outside of the recording
        for call in calls:
            call()
        stream.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[0]()
        end.record()
        end.synchronize()
        count = calls_needed(len(calls), max(estimate, begin.elapsed_time(end) / 1e3 / 2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(count):
                calls[number % len(calls)]()
        return statistics.median([_replay(torch, graph) for _ in range(WARM + REPLAYS)][WARM:]) / count


def _replay(torch: Any, graph: Any) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def machine_limits(torch: Any) -> tuple[Limits, dict[str, float]]:
    """The GPU's own limits, measured: (what rows are compared with, all that was measured by name).

    Bandwidth is that of a copy on the device, bytes read and written. Rates are of square products of random numbers
    through cuBLAS (``torch.matmul``, ``torch._scaled_mm``).
    """
    copy, read = _bandwidths(torch)
    flops = {"bf16": _matrix_rate(torch, _bf16_product(torch))}
    if torch.cuda.get_device_capability() >= (8, 9):
        flops["fp8"] = _matrix_rate(torch, _fp8_product(torch))
    measured = {"copy bytes/s": copy, "read bytes/s (torch.sum)": read}
    measured |= {f"{name} matrix FLOP/s": rate for name, rate in flops.items()}
    return Limits(measured["copy bytes/s"], flops), measured


def _bandwidths(torch: Any) -> tuple[float, float]:
    """Bytes a second of copying (read and written), and of reading alone."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4) // 16 * 16
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target, numbers = torch.empty_like(source), source.view(torch.float32)
    copy = timed(torch, [lambda: target.copy_(source)], size / 1e12)
    read = timed(torch, [lambda: torch.sum(numbers)], size / 1e12)
    return 2 * size / copy, size / read


def _matrix_rate(torch: Any, product: Call) -> float:
    return 2 * SQUARE**3 / timed(torch, [product], 2 * SQUARE**3 / 1e15)


def _bf16_product(torch: Any) -> Call:
    a, b = (torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: torch.matmul(a, b)


def _fp8_product(torch: Any) -> Call:
    """One scale for each matrix; FP8 wants the second one by columns."""
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(  # noqa: SLF001 - torch has no public name for it
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
