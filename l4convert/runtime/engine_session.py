"""Run the engines of an artifact on a GPU: the interface of :class:`~l4convert.runtime.session.OrtSession`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Never, Self

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import BackendMissing, UsageError
from l4convert.gpus import Gpu, Gpus, find_gpus
from l4convert.runtime.bound_engine import GRAPH_USES, BoundEngine
from l4convert.runtime.calls import InPlaceCall, calls_in_room
from l4convert.runtime.device import Device
from l4convert.runtime.engine_layout import longest_call
from l4convert.runtime.engines import (
    MODULES,
    Engine,
    check_engine_files,
    choose_engine,
    named_engines,
    read_engines,
    with_plugins,
)
from l4convert.runtime.history import TokenHistory, plan_return
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.occupancy import Slots
from l4convert.runtime.runner import FloatArray, IntArray, check_step, check_vocabulary

OpenDevice = Callable[[Gpu, Engine], Device]


def open_cuda(gpu: Gpu, engine: Engine) -> Device:
    """A GPU through cuda-python, with the TensorRT module of the engine.

    Raises:
        BackendMissing: One of the two is not installed.
    """
    from l4convert.runtime.cuda import CudaDevice

    plugins = None if engine.plugins is None else engine.plugins.path
    return CudaDevice.open(gpu, engine.module, engine.version, plugins)


class EngineSession:
    """An engine that is loaded on a GPU; :meth:`open` makes one, :meth:`start` begins a batch of sequences.

    One batch at a time: the caches exist once, and a new batch takes them over.

    Attributes:
        info: The artifact's manifest.
        engine: What the manifest says of the engine.
        gpu: Where it runs.
        max_length: How many tokens a sequence can have; ``max_batch``: how many sequences.
    """

    def __init__(self, info: ArtifactInfo, engine: Engine, gpu: Gpu, device: Device, max_length: int) -> None:
        self.info = info
        self.engine = engine
        self.gpu = gpu
        self.max_length = max_length
        self.max_batch = engine.max_batch
        self._device = device
        self._bound = BoundEngine(engine, info.config, device)
        self._current: EngineStream | None = None

    @classmethod
    def open(
        cls,
        artifact: Path,
        *,
        hardware: str | None = None,
        max_length: int | None = None,
        plugins: Path | None = None,
        gpus: Callable[[], Gpus] = find_gpus,
        open_device: OpenDevice = open_cuda,
    ) -> Self:
        """Load an artifact's engine onto the first GPU (``CUDA_VISIBLE_DEVICES`` makes another the first).

        Args:
            artifact: The folder that ``convert`` wrote and ``build`` added engines to.
            hardware: The hardware profile whose engine to take; default: the first for this GPU.
            max_length: Tokens a sequence will have at most. Default, and limit: what the engine was built for.
            plugins: The plugin library, where it is no longer where the engine was built with it.
            gpus: Finds GPUs; ``open_device``: opens one. Both are there to be replaced where there is no GPU.

        Raises:
            InputError: No artifact or engine, one for another GPU, or a file that is not what the manifest says.
            UsageError: No engine of that name, a length that it was not built for, or plugins that it has none of.
            BackendMissing: No GPU, or cuda-python or TensorRT is not installed.
            DeviceError: The GPU refuses the engine.
        """
        info = read_artifact(artifact)
        candidates = named_engines(read_engines(artifact), hardware, artifact)
        found = gpus()
        if not found.devices:
            raise BackendMissing(
                f"{found.problem} on this machine, and an engine runs on an NVIDIA GPU only",
                "`l4convert doctor` shows what was found; without --engine the CPU runs the artifact's ONNX graph.",
            )
        gpu = found.devices[0]
        engine = choose_engine(candidates, gpu, artifact)
        if max_length is not None and not 0 < max_length <= engine.max_context:
            raise UsageError(
                f"a maximum length of {max_length} is not between 1 and the {engine.max_context} tokens that the "
                f"engine for {engine.hardware} was built for",
                "Build one with a larger --max-context.",
            )
        check_engine_files(artifact, engine)
        engine = with_plugins(engine, plugins)
        device = open_device(gpu, engine)
        try:
            return cls(info, engine, gpu, device, max_length or engine.max_context)
        except BaseException:
            device.close()
            raise

    @property
    def name(self) -> str:
        """Artifact, engine and GPU."""
        return f"{self.info.path.name}, {MODULES[self.engine.module]} engine {self.engine.hardware} on {self.gpu.name}"

    @property
    def config(self) -> DecoderConfig:
        """The model's hyperparameters."""
        return self.info.config

    @property
    def graphs(self) -> str:
        """One line: whether decode steps are replayed as CUDA graphs."""
        return GRAPH_USES[self._bound.graph_use]

    @property
    def device_bytes(self) -> int:
        """Device memory of caches and buffers, weights and scratch apart."""
        return self._bound.layout.nbytes

    def start(self, batch: int) -> EngineStream:
        """Begin ``batch`` empty sequences; a stream that was started before is over.

        Raises:
            UsageError: More than the engine was built for.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        if batch > self.max_batch:
            raise UsageError(
                f"{batch} sequences at once, and the engine for {self.engine.hardware} was built for {self.max_batch}",
                "Build one with a larger --max-batch.",
            )
        self._bound.empty_caches()
        self._current = EngineStream(self, self._bound, batch)
        return self._current

    def is_current(self, stream: EngineStream) -> bool:
        """Whether the caches are still this stream's."""
        return self._current is stream

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current = None
        self._bound.close()
        self._device.close()


class EngineStream:
    """A batch of sequences fed to an :class:`EngineSession`."""

    def __init__(self, session: EngineSession, bound: BoundEngine, batch: int) -> None:
        self._session = session
        self._bound = bound
        lengths = np.zeros(batch, np.int64)
        self._slots = Slots(lengths, session.config.attention_chunk_size)
        self._history = TokenHistory(lengths)

    @property
    def lengths(self) -> IntArray:
        """Tokens that each row has in the caches, int64 [B]."""
        return self._slots.lengths.copy()

    def step(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append tokens; see :meth:`l4convert.runtime.runner.Stream.step`.

        A step may be several calls of the engine: none is wider than its widest profile or crosses a chunk boundary.

        Raises:
            InputError: A token outside the vocabulary.
            UsageError: The text would become longer than the session's ``max_length``.
            DeviceError: The GPU refused a call.
        """
        new = self._checked(input_ids, mask)
        logits = np.zeros((*input_ids.shape, self._session.config.vocab_size), np.float32)
        for call in self._run(input_ids, new):
            call.put(self._bound.logits(), logits)
        return logits

    def last(self, input_ids: IntArray) -> FloatArray:
        """Append tokens, none of them padding; logits of the last token of each row only, float32 [B, vocabulary].

        See :func:`l4convert.runtime.runner.last_logits`. Raises what :meth:`step` raises.
        """
        for _ in self._run(input_ids, self._checked(input_ids, None)):
            pass
        return self._bound.last_logits()

    def rollback(self, tokens: int | IntArray) -> None:
        """Forget the last tokens of each row; see :meth:`l4convert.runtime.stream.OrtStream.rollback`.

        Caches stay where they are; rows that go back into an earlier chunk are fed that chunk's tokens again.

        Raises:
            ValueError: A row has fewer tokens, or a number is negative; or another batch has the caches now.
            DeviceError: The GPU refused a call.
        """
        self._check_current()
        way = plan_return(tokens, self._slots, self._history, self._session.config.attention_chunk_size, held=0)
        self._slots.cut(way.lengths)
        for _ in self._run(way.ids, way.mask, known=True):
            pass

    def fork(self, copies: int | None = None) -> Never:
        """An engine's caches exist once, so a stream cannot be copied.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "an engine has one set of caches, so its streams cannot be forked",
            "Start a batch and feed the common beginning to every row, or run the artifact without --engine.",
        )

    def _run(self, input_ids: IntArray, new: IntArray, known: bool = False) -> Iterator[InPlaceCall]:
        """Run a step in calls that the engine takes; each is given when its logits can be read.

        Args:
            input_ids: [B, S]; ``new``: the same, 1 for a token.
            known: The tokens are in the history already.
        """
        if not known:
            self._history.append(self._slots.lengths, input_ids, new)
        engine, chunk = self._session.engine, self._session.config.attention_chunk_size
        for call in calls_in_room(self._slots, new, chunk, engine.max_context, longest_call(engine.profiles)):
            self._bound.call(call, input_ids)
            yield call

    def _check_current(self) -> None:
        if not self._session.is_current(self):
            raise ValueError("another batch was started in this session, and has the caches now")

    def _checked(self, input_ids: IntArray, mask: IntArray | None) -> IntArray:
        """The mask of a step's new tokens, after every check."""
        self._check_current()
        new = check_step(input_ids, mask, len(self._slots.lengths))
        check_vocabulary(input_ids, self._session.config.vocab_size)
        longest = int((self._slots.lengths + new.sum(axis=1)).max())
        if longest > self._session.max_length:
            raise UsageError(
                f"the text needs {longest} positions and the session has {self._session.max_length}",
                f"The engine for {self._session.engine.hardware} was built for {self._session.engine.max_context}; "
                "build one with a larger --max-context.",
            )
        return new
