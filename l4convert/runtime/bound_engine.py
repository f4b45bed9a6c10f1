"""An engine with its device memory: token ids and a mask go in, logits come out, and the caches stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import DeviceError
from l4convert.runtime.calls import InPlaceCall
from l4convert.runtime.device import Device, Graph, Plan, Shape
from l4convert.runtime.engine_layout import DTYPES, IDS, LOGITS, MASK, Layout, choose_profile, concrete, plan_layout
from l4convert.runtime.engines import Engine
from l4convert.runtime.runner import FloatArray, IntArray

GraphUse = Literal["replayed", "captured", "refused", "unused"]

GRAPH_USES: dict[GraphUse, str] = {
    "replayed": "decode steps are replayed as CUDA graphs by TensorRT-RTX",
    "captured": "decode steps are replayed as a CUDA graph",
    "refused": "decode steps are enqueued one by one: this engine cannot be captured as a CUDA graph",
    "unused": "no decode step so far",
}


_Shapes = tuple[Shape, Shape]
"""Of the token ids and of the mask; those of all other tensors follow from them."""


@dataclass(frozen=True)
class _Captured:
    """The CUDA graph of a decode step, the profile and the shapes it was captured with."""

    profile: int
    shapes: _Shapes
    graph: Graph


class BoundEngine:
    """Device memory for an engine's largest batch and longest text, allocated once.

    Args:
        engine: What to run; its files have been checked.
        config: The model's hyperparameters.
        device: Where.

    Attributes:
        layout: The buffers.
        graph_use: What became of CUDA graphs so far.

    Raises:
        DeviceError: The device refuses the plans, or has too little memory.
    """

    def __init__(self, engine: Engine, config: DecoderConfig, device: Device) -> None:
        self.engine = engine
        self.layout: Layout = plan_layout(engine, config)
        self.graph_use: GraphUse = "unused"
        self._device = device
        self._captured: _Captured | None = None
        self._bound: dict[int, _Shapes] = {}
        self._called: Shape = (0, 0)
        self._decoded: IntArray | None = None  # lengths before the last call, where it gave each row one token
        self._addresses: dict[str, int] = {}
        self._plans: list[Plan] = []
        try:
            self._allocate()
        except BaseException:
            self.close()
            raise

    def empty_caches(self) -> None:
        """Zero every cache: slots that no token has written are masked, and must hold numbers for that."""
        for name, nbytes in self.layout.caches.items():
            self._device.zero(self._addresses[name], nbytes)

    def call(self, call: InPlaceCall, input_ids: IntArray) -> None:
        """Start every plan once; what is read afterwards waits for them.

        Args:
            call: Which tokens, at most as many columns as the widest profile takes.
            input_ids: Of the step that the call is a part of.
        """
        ids = np.ascontiguousarray(call.take(input_ids), DTYPES[self._input(IDS)])
        self._device.copy_in(self._addresses[IDS], ids)
        self._write_mask(call)
        profile = choose_profile(self.engine.profiles, ids.shape[1])
        run = self._decode if ids.shape[1] == 1 else self._enqueue
        run(profile, (ids.shape, (len(ids), self.engine.max_context)))
        self._called = ids.shape

    def logits(self) -> FloatArray:
        """Those of the last call, float32 [B, S, vocabulary]."""
        return self._read(0, self._called)

    def last_logits(self) -> FloatArray:
        """Those of its last column, float32 [B, vocabulary]: of a long prompt far less to copy."""
        batch, tokens = self._called
        return np.concatenate([self._read((row + 1) * tokens - 1, (1, 1))[0] for row in range(batch)])

    def close(self) -> None:
        """Free everything on the device; what a fault has made impossible to free is gone with it."""
        with suppress(DeviceError):
            self._device.wait()
        with suppress(DeviceError):
            self._forget()
        for plan in self._plans:
            plan.close()
        self._plans.clear()
        for address in self._addresses.values():
            with suppress(DeviceError):
                self._device.free(address)
        self._addresses.clear()

    def _allocate(self) -> None:
        decode = frozenset({choose_profile(self.engine.profiles, 1)})
        self._plans = [self._device.load(plan.path, replay=decode) for plan in self.engine.files]
        scratch = max(plan.scratch_bytes for plan in self._plans)
        needed, free = self.layout.nbytes + scratch, self._device.free_bytes()
        if needed > free:
            raise DeviceError(
                f"{self.engine.files[0].path.parent}: caches and buffers take {needed / 1e9:.2f} GB beside the "
                f"weights, and {self._device.name} has {free / 1e9:.2f} GB free",
                "Build with a smaller --max-context or --max-batch.",
            )
        for name, nbytes in {**self.layout.buffers, **self.layout.caches, "scratch": scratch}.items():
            self._addresses[name] = self._device.alloc(max(nbytes, 1))
        for plan in self._plans:
            plan.use_scratch(self._addresses["scratch"], scratch)

    def _write_mask(self, call: InPlaceCall) -> None:
        """Bring the mask on the device up to date.

        One width for every mask, whatever the texts' lengths, keeps the shapes of all decode steps the same, as a CUDA
        graph needs; columns that are too many are padding in front, which changes no position. So the mask of a decode
        step is that of the one before with a one more in each row, in front of the others: only these are copied.
        """
        address, dtype, columns = self._addresses[MASK], DTYPES[self._input(MASK)], self.engine.max_context
        decoding = call.columns.shape[1] == 1 and bool(call.real.all())
        if decoding and self._decoded is not None and np.array_equal(self._decoded + 1, call.lengths):
            for row, length in enumerate(call.lengths.tolist()):
                place = row * columns + columns - 1 - length
                self._device.copy_in(address + place * dtype.itemsize, np.ones(1, dtype))
        else:
            self._device.copy_in(address, np.ascontiguousarray(call.attention_mask(columns), dtype))
        self._decoded = call.lengths if decoding else None

    def _read(self, first: int, shape: Shape) -> FloatArray:
        """Logits of ``shape`` [rows, tokens], from the token ``first`` of the buffer on."""
        tensor = self.engine.files[-1].outputs[LOGITS]
        dtype, vocabulary = DTYPES[tensor.dtype], tensor.shape[-1]
        address = self._addresses[LOGITS] + first * vocabulary * dtype.itemsize
        return self._device.copy_out(address, (*shape, vocabulary), dtype).astype(np.float32, copy=False)

    def _input(self, name: str) -> str:
        """The element type of an input, in the first plan that has it."""
        return self.engine.files[0].inputs[name].dtype

    def _decode(self, profile: int, shapes: _Shapes) -> None:
        """One token a row: a CUDA graph where that can be."""
        if self._captured is not None and self._captured.shapes == shapes:
            self._captured.graph.launch()
            return
        self._enqueue(profile, shapes)
        if all(plan.replayed(profile) for plan in self._plans):
            self.graph_use = "replayed"
        elif self.engine.module == "tensorrt_rtx":
            # What TensorRT-RTX does not replay itself it does not let others capture either.
            self.graph_use = "refused"
        elif self.graph_use != "refused":
            # After a call of the same shapes, as TensorRT asks for: that one settles what is done once for them.
            graph = self._device.capture(self._work(profile))
            self._captured = None if graph is None else _Captured(profile, shapes, graph)
            self.graph_use = "refused" if graph is None else "captured"

    def _enqueue(self, profile: int, shapes: _Shapes) -> None:
        if self._captured is not None and self._captured.profile == profile:
            self._forget()  # a call of other shapes makes what was captured in the same context stale
        if self._bound.get(profile) != shapes:
            self._bind(profile, shapes)
        self._work(profile)()

    def _bind(self, profile: int, shapes: _Shapes) -> None:
        (batch, tokens), (_, columns) = shapes
        for plan, file, binding in zip(self._plans, self.engine.files, self.layout.bindings, strict=True):
            inputs = {name: concrete(tensor, batch, tokens, columns) for name, tensor in file.inputs.items()}
            plan.bind(profile, inputs, {name: self._addresses[buffer] for name, buffer in binding.items()})
        self._bound[profile] = shapes

    def _work(self, profile: int) -> Callable[[], None]:
        def enqueue_all() -> None:
            for plan in self._plans:
                plan.enqueue(profile)

        return enqueue_all

    def _forget(self) -> None:
        if self._captured is not None:
            self._device.wait()  # it may still run
            self._captured.graph.free()
            self._captured = None
