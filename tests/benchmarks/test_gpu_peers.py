"""The torch path beside the kernels computes what the functions' bodies compute; ONNX Runtime's nodes load and run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from l4convert.plugins.moe.definition import MoESpec
from tests.benchmarks.scripts import load

cases = load("gpu_cases")
correctness = load("gpu_correctness")
onnx_peers = load("gpu_onnxruntime")
peers = load("gpu_peers")
reference = load("gpu_reference")
roofline = load("roofline")
speed = load("gpu_speed")
tensors = load("gpu_tensors")
timing = load("gpu_timing")
workloads = load("gpu_workloads")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def error(actual: Any, expected: np.ndarray) -> float:
    found: float = correctness.relative_error(reference.on_host(torch, actual).ravel(), expected.ravel())
    return found


@pytest.mark.parametrize(
    ("weights", "block", "scaled"),
    [("int4", 32, False), ("int4", 128, False), ("fp8", 0, False), ("fp8", 0, True), ("plain", 0, False)],
)
def test_experts_in_torch(weights: str, block: int, scaled: bool) -> None:
    experts = roofline.Experts(4, 128, 256, 1, weights, block)
    maker = tensors.Maker(torch, "cpu")
    made = maker.weights(experts)
    chosen = np.array([0, 1, 1, 3, 0])
    call = maker.routed(experts, made, chosen)
    spec = MoESpec(4, 128, 256, 1, "fp8" if scaled else "", "bfloat16")
    y = peers.TorchMoe(torch, experts, made, capable=scaled).call(call, chosen)()
    # Where both round to FP8, a number between two of its steps may go to either.
    assert error(y, reference.moe_body(torch, spec, experts, call)) < (0.04 if scaled else 0.01)


@pytest.mark.parametrize("kv", ["none", "fp8", "int8"])
@pytest.mark.parametrize(
    ("chunk", "new", "context"), [(64, 1, 100), (64, 64, 64), (64, 256, 256), (0, 1, 100), (0, 100, 100), (0, 20, 90)]
)
def test_attention_in_torch(kv: str, chunk: int, new: int, context: int) -> None:
    layer = roofline.Attention(10, 2, 32, chunk, kv)
    row = workloads.AttentionRow("", layer, 1 if new > 64 else 2, new, context)
    positions = np.tile(np.arange(context), (row.batch, 1))
    call = tensors.Maker(torch, "cpu").attended(layer, positions, new, row.slots)
    expected = reference.attention_body(torch, speed.spec_of(row), call)
    for cache, written in zip((call.past_key, call.past_value), expected[1:], strict=True):
        cache.copy_(torch.from_numpy(written).to(cache.dtype))
    peer = peers.TorchAttention(torch, layer, call, new, context)
    if peer.comparable:
        assert error(peer.call(), expected[0]) < 0.01
    else:
        assert peer.call().shape == call.attention.shape


def test_without_onnxruntime_the_body_runs_in_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = roofline.Experts(4, 128, 128, 2, "fp8")
    call = tensors.Maker(torch, "cpu")
    made = call.routed(experts, call.weights(experts), np.array([[0, 1], [3, 2]]))
    spec = MoESpec(4, 128, 128, 2, "fp8", "bfloat16")
    expected = reference.moe_body(torch, spec, experts, made)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    np.testing.assert_allclose(reference.moe_body(torch, spec, experts, made), expected, rtol=1e-2, atol=1e-3)


def test_onnxruntime_s_nodes_run_on_its_cpu_kernels() -> None:
    def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        content = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))

    def normal(*shape: int) -> np.ndarray:
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    model = onnx_peers.qmoe_model(roofline.Experts(4, 128, 256, 1, "int4", 32), "float32", prepacked=True)
    (y,) = run(model, {"x": normal(5, 128), "router": np.eye(5, 4, dtype=np.float32)})
    assert y.shape == (5, 128)
    assert 0.1 < np.abs(y).mean() < 10
    feeds = {"query": normal(1, 1, 160), "key": normal(1, 1, 32), "value": normal(1, 1, 32)}
    feeds |= {name: normal(1, 1, 64, 32) for name in ("past_key", "past_value")}
    feeds |= {"last": np.array([9], np.int32), "total": np.array(10, np.int32)}
    outputs = run(onnx_peers.gqa_model(roofline.Attention(5, 1, 32, 64), "float32", prepares=False), feeds)
    assert [output.shape for output in outputs] == [(1, 1, 160), (1, 1, 64, 32), (1, 1, 64, 32)]
    np.testing.assert_array_equal(outputs[1][0, 0, 9], feeds["key"][0, 0])


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (roofline.Experts(4, 128, 256, 1, "fp8"), "no FP8 weights"),
        (roofline.Experts(128, 5120, 8192, 1, "int4", 128), "too large"),
    ],
)
def test_what_onnxruntime_has_no_kernel_for(experts: Any, reason: str) -> None:
    with pytest.raises(onnx_peers.NotHere, match=reason):
        onnx_peers.qmoe_model(experts)


def test_an_onnxruntime_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(onnx_peers.NotHere, match="no CUDA provider: pip install onnxruntime-gpu"):
        onnx_peers.cuda_runtime()


class Clock:
    """Stands in for ``torch.cuda``: a call takes a second, a replay what its recorded calls take."""

    def __init__(self) -> None:
        self.now, self.recording, self.recorded, self.replays = 0.0, False, 0, 0
        self.Stream = self.CUDAGraph = lambda: self
        self.OutOfMemoryError = MemoryError

    def call(self) -> None:
        if self.recording:
            self.recorded += 1
        else:
            self.now += 1.0

    def current_stream(self) -> Clock:
        return self

    def wait_stream(self, other: Clock) -> None:
        assert other is self

    def synchronize(self) -> None:
        assert not self.recording

    def stream(self, stream: Clock) -> Clock:
        return stream

    def graph(self, graph: Clock, stream: Clock) -> Clock:
        assert graph is stream is self
        self.recording = True
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.recording = False

    def replay(self) -> None:
        self.replays += 1
        slow = 100.0 if self.replays in (1, 2, 10) else 1.0  # warming up, and one that was disturbed
        self.now += self.recorded * slow

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 - torch's name
        assert enable_timing
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event


def test_times_are_medians_of_replays_over_their_calls() -> None:
    clock = Clock()
    seconds = timing.timed(SimpleNamespace(cuda=clock), [clock.call] * 3, 1.0)
    assert seconds == 1.0
    assert clock.recorded == 3  # each set of buffers once
    assert clock.replays == timing.WARM + timing.REPLAYS


class OnHost:
    """torch, with its GPU in the host's memory and a clock by which every call takes a second."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.cuda = Clock()
        self.cuda.mem_get_info = lambda: (1 << 20, 1 << 20)
        self.cuda.get_device_capability = lambda: capability

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in {"empty", "randn", "ones"}:
            return found

        def on_host(*sizes: int, device: str, **options: Any) -> Any:
            assert device == "cuda"
            return found(*sizes, **options)

        return on_host


@pytest.mark.parametrize(("capability", "rates"), [((9, 0), {"bf16", "fp8"}), ((8, 0), {"bf16"})])
def test_limits_of_a_machine(capability: tuple[int, int], rates: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    host = OnHost(capability)
    calls = []

    def timed(_: Any, work: Any, estimate: float) -> float:
        calls.append(work[0]())
        return 2.0

    monkeypatch.setattr(timing, "timed", timed)
    monkeypatch.setattr(timing, "SQUARE", 64)
    limits, measured = timing.machine_limits(host)
    assert set(limits.flops) == rates
    assert limits.bandwidth == measured["copy bytes/s"] == 2 * (1 << 18) / 2.0  # a quarter of what is free, both ways
    assert measured["read bytes/s (torch.sum)"] == (1 << 18) / 2.0
    assert limits.flops["bf16"] == 2 * 64**3 / 2.0
    assert [product.shape for product in calls[2:]] == [(64, 64)] * len(rates)


def test_graphs_are_long_enough_and_go_past_the_cache() -> None:
    assert timing.sets_needed(33_000_000, 50 << 20) == 7
    assert timing.sets_needed(1 << 30, 50 << 20) == 1
    assert timing.sets_needed(1, 50 << 20) == timing.MOST_SETS
    assert timing.calls_needed(7, 10e-6) == 70
    assert timing.calls_needed(3, 1.0) == 3
    assert timing.calls_needed(7, 100e-6) == 14
