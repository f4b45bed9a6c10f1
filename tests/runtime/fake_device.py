"""A GPU made of NumPy and ONNX Runtime: memory with addresses, a stream, and plans that run an artifact's graph.

It is strict where a GPU would be silently wrong: memory is garbage until it is written, an address must have been
allocated, a tensor must fit its buffer, and capturing records without running.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from l4convert.emit import read_manifest
from l4convert.emit.manifest import encode_manifest
from l4convert.gpus import Gpu, Gpus
from l4convert.runtime import EngineSession
from l4convert.runtime.engines import Engine

GPU = Gpu(0, "Fake RTX", "8.9", 24 << 30)
CONTEXT, BATCH, PREFILL = 48, 3, 16
PROFILES = [{"name": "prefill", "tokens": [1, 8, PREFILL]}, {"name": "decode", "tokens": [1, 1, 8]}]
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16", onnx.TensorProto.INT64: "int64"}


def gpus() -> Gpus:
    return Gpus("13.0", (GPU,), None)


class FakeDevice:
    """What :mod:`l4convert.runtime.cuda` is on a GPU.

    Attributes:
        memory: Address -> bytes. calls: (profile, shapes) of everything that ran. captures, launches: of CUDA graphs.
        copied: Bytes that were read back. written: Bytes that were copied in.
    """

    def __init__(self, *, free: int = 1 << 40, capturable: bool = True, replays: bool = False) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.plans: list[FakePlan] = []
        self.calls: list[tuple[int, dict[str, tuple[int, ...]]]] = []
        self.captures = self.launches = self.copied = self.written = 0
        self.closed = False
        self.capturable, self.replays = capturable, replays
        self._free = free
        self._next = 1 << 20
        self._recording: list[Callable[[], None]] | None = None

    name = GPU.name
    compute_capability = GPU.compute_capability

    def free_bytes(self) -> int:
        return self._free

    def alloc(self, nbytes: int) -> int:
        address, self._next = self._next, self._next + (nbytes + 511) // 256 * 256
        self.memory[address] = np.full(nbytes, 0xFF, np.uint8)  # NaN in every float type
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def zero(self, address: int, nbytes: int) -> None:
        assert len(self.memory[address]) == nbytes
        self.memory[address][:] = 0

    def copy_in(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.written += array.nbytes
        self.store(address, array)

    def store(self, address: int, array: np.ndarray) -> None:
        self.block(address)[: array.nbytes] = array.reshape(-1).view(np.uint8)

    def copy_out(self, address: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        array = self.read(address, shape, dtype)
        self.copied += array.nbytes
        return array

    def read(self, address: int, shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
        return self.block(address)[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape).copy()

    def block(self, address: int) -> np.ndarray:
        """The memory from an address within some block to its end."""
        start = max(block for block in self.memory if block <= address)
        return self.memory[start][address - start :]

    def load(self, file: Path, *, replay: frozenset[int] = frozenset()) -> FakePlan:
        plan = FakePlan(self, file, replay if self.replays else frozenset())
        self.plans.append(plan)
        return plan

    def capture(self, work: Callable[[], None]) -> FakeGraph | None:
        self.captures += 1
        if not self.capturable:
            return None
        self._recording = []
        work()
        graph, self._recording = FakeGraph(self, self._recording), None
        return graph

    def submit(self, work: Callable[[], None]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeGraph:
    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self.device, self.work = device, work
        self.alive = True

    def launch(self) -> None:
        assert self.alive
        self.device.launches += 1
        for one in self.work:
            one()

    def free(self) -> None:
        assert self.alive
        self.alive = False


class FakePlan:
    """An engine whose file holds an ONNX graph."""

    scratch_bytes = 1000

    def __init__(self, device: FakeDevice, file: Path, replay: frozenset[int]) -> None:
        self.device = device
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # as the session of such artifacts does
        self.session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.types = {value.name: value.type for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.bound: dict[int, tuple[Mapping[str, tuple[int, ...]], Mapping[str, int]]] = {}
        self.replay = replay
        self.scratch: tuple[int, int] | None = None
        self.closed = False
        self.binds = 0

    def use_scratch(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.scratch_bytes
        assert len(self.device.memory[address]) >= nbytes
        self.scratch = (address, nbytes)

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        least, _, most = PROFILES[profile]["tokens"]
        ids = shapes.get("input_ids") or shapes["hidden_states"]
        assert least <= ids[1] <= most  # type: ignore[operator]
        assert shapes.keys() == {value.name for value in self.session.get_inputs()}
        assert addresses.keys() == self.types.keys()
        self.bound[profile] = (dict(shapes), dict(addresses))
        self.binds += 1

    def enqueue(self, profile: int) -> None:
        assert self.scratch is not None
        shapes, addresses = self.bound[profile]
        self.device.submit(lambda: self._run(profile, shapes, addresses))

    def _run(self, profile: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        self.device.calls.append((profile, dict(shapes)))
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        feeds = {n: self.device.read(addresses[n], s, np.dtype(kinds[self.types[n]])) for n, s in shapes.items()}
        names = [value.name for value in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            self.device.store(addresses[name], np.ascontiguousarray(array))

    def replayed(self, profile: int) -> bool:
        return profile in self.replay

    def close(self) -> None:
        self.closed = True


def add_engines(artifact: Path, *, cuts: Sequence[int] = (), hardware: str = "rtx-4090", **changes: Any) -> Path:
    """List engines in an artifact's manifest, as ``build`` does; the plans are its graph, cut before some layers."""
    manifest = read_manifest(artifact)
    config = manifest["config"]
    edges = [0, *cuts, len(config["layers"])]
    folder = artifact / "engines" / hardware
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(artifact, folder, first, stop, config) for first, stop in pairwise(edges)]
    shared = {
        "hardware": hardware,
        "compute_capability": "8.9",
        "builder": {"name": "tensorrt_rtx", "version": "1.7.1.116"},
        "flags": [],
        "max_batch": BATCH,
        "max_context": CONTEXT,
        "profiles": PROFILES,
        "source_sha256": manifest["files"]["model.onnx"]["sha256"],
    }
    manifest["engines"] = [*manifest.get("engines", []), *({**entry, **shared, **changes} for entry in entries)]
    (artifact / "l4convert.json").write_bytes(encode_manifest(manifest))
    return artifact


def _entry(artifact: Path, folder: Path, first: int, stop: int, config: Mapping[str, Any]) -> dict[str, Any]:
    model = segment(onnx.load(artifact / "model.onnx"), first, stop, len(config["layers"]))
    file = folder / f"layers-{first:02}-{stop - 1:02}.plan"
    content = model.SerializeToString()
    file.write_bytes(content)
    slots = [
        min(config["attention_chunk_size"], CONTEXT) if layer["chunked"] else CONTEXT for layer in config["layers"]
    ]
    return {
        "path": file.relative_to(artifact).as_posix(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "layers": [first, stop],
        "inputs": [_tensor(value, slots) for value in model.graph.input],
        "outputs": [_tensor(value, slots) for value in model.graph.output],
    }


def _tensor(value: onnx.ValueInfoProto, slots: Sequence[int]) -> dict[str, Any]:
    shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
    if value.name.startswith(("past_key_values.", "present.")):
        shape[2] = slots[int(value.name.split(".")[1])]
    return {"name": value.name, "dtype": DTYPES[value.type.tensor_type.elem_type], "shape": shape}


def segment(model: onnx.ModelProto, first: int, stop: int, layers: int) -> onnx.ModelProto:
    """The layers ``first`` to before ``stop`` of the canonical graph, by onnx's own extractor."""
    if (first, stop) == (0, layers):
        return model
    edge = {n: f"layers.{n}/feed_forward/residual" for n in range(layers)}
    caches = [f"{n}.{kind}" for n in range(first, stop) for kind in ("key", "value")]
    inputs = ["input_ids" if first == 0 else edge[first - 1], "attention_mask"]
    outputs = ["logits" if stop == layers else edge[stop - 1]]
    hidden = onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, ["batch", "sequence", 64])
    for name in (edge[first - 1] if first else "", edge[stop - 1] if stop < layers else ""):
        if name:
            value = model.graph.value_info.add()
            value.CopyFrom(hidden)
            value.name = name
    part = onnx.utils.Extractor(model).extract_model(
        [*inputs, *(f"past_key_values.{name}" for name in caches)], [*outputs, *(f"present.{name}" for name in caches)]
    )
    _rename(part, inputs[0], "input_ids" if first == 0 else "hidden_states")
    _rename(part, outputs[0], "logits" if stop == layers else "hidden_states.next")
    return part


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def opener(device: FakeDevice) -> Callable[[Gpu, Engine], FakeDevice]:
    return lambda gpu, engine: device


def opened(artifact: Path, device: FakeDevice | None = None, **options: object) -> EngineSession:
    return EngineSession.open(artifact, gpus=gpus, open_device=opener(device or FakeDevice()), **options)  # type: ignore[arg-type]
