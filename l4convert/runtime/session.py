"""Run an artifact with ONNX Runtime, through the I/O contract of DESIGN section 5."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.write import MODEL_FILE
from l4convert.errors import InputError, UsageError, backend_missing
from l4convert.runtime.cache_elements import CacheElements, cache_elements, mixed_types
from l4convert.runtime.caches import CACHE_FORMS, CacheNames, CacheRoom, KvCacheState
from l4convert.runtime.calls import in_place_calls
from l4convert.runtime.cpu_form import cpu_form_of
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.providers import PROVIDERS, Provider, check_started, prepare
from l4convert.runtime.runner import FloatArray, IntArray, check_step, check_vocabulary

# How long a stream may become in the static form where the caller does not say: enough for a conversation, and small
# beside the weights (Scout: 0.8 GB of float32 caches).
DEFAULT_MAX_LENGTH = 4096

# Session configuration under which ONNX Runtime computes what the graph says. It rewrites MatMul with a dequantized
# INT4 matrix to MatMulNBits, by default (4) with activations rounded to int8; 1 keeps them float32.
SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "1"}


class OrtSession:
    """A loaded artifact; :meth:`open` makes one, :meth:`start` begins a batch of sequences.

    Attributes:
        info: The artifact's manifest.
        max_length: How many tokens (padding included) a stream can take.
        provider: Where it runs; ``cuda`` keeps the caches in the GPU's memory.
    """

    def __init__(self, info: ArtifactInfo, session: Any, max_length: int, provider: Provider = "cpu") -> None:
        self.info = info
        self.max_length = max_length
        self.provider: Provider = provider
        self._session: Any = session
        self._cache_elements = _check_contract(info, session)

    @classmethod
    def open(
        cls,
        artifact: Path,
        *,
        max_length: int | None = None,
        threads: int | None = None,
        provider: Provider = "cpu",
    ) -> Self:
        """Load an artifact.

        Args:
            artifact: The folder that ``convert`` wrote.
            max_length: Tokens to make room for in the static form. Default: 4096, or all the model's positions where
                they are fewer. The other forms grow and take this as a limit only where it is given.
            threads: Threads for one operator; default: ONNX Runtime's choice.
            provider: The execution provider: ``cpu`` or ``cuda``.

        Raises:
            InputError: No artifact, a damaged one, or a graph that does not keep the I/O contract.
            UsageError: ``max_length`` is not positive or is more than the model's positions.
            BackendMissing: onnxruntime is not installed, or has no such provider, or there is no GPU.
        """
        info = read_artifact(artifact)
        limit = info.config.max_position_embeddings
        if max_length is not None and not 0 < max_length <= limit:
            raise UsageError(f"a maximum length of {max_length} is not between 1 and the model's {limit} positions")
        default = min(DEFAULT_MAX_LENGTH, limit) if info.kv_cache == "static" else limit
        # Graphs of the other runtimes are lowered to what this one fuses well.
        fuse = info.calls == "any"
        rewrite = provider == "cpu" and (info.compute == "bfloat16" or info.target == "cuda")
        session = load_model(artifact / MODEL_FILE, threads, cpu_form=rewrite, fuse_quantized=fuse, provider=provider)
        return cls(info, session, max_length or default, provider)

    @property
    def name(self) -> str:
        """The artifact's folder name, and where it runs unless that is the CPU."""
        return self.info.path.name if self.provider == "cpu" else f"{self.info.path.name}, {PROVIDERS['cuda'][0]}"

    @property
    def config(self) -> DecoderConfig:
        """The model's hyperparameters."""
        return self.info.config

    def new_cache(self, batch: int) -> KvCacheState:
        """Empty key/value caches for ``batch`` sequences, in the artifact's cache form."""
        room = CacheRoom(batch, self.max_length, self._cache_elements, self.provider)
        return CACHE_FORMS[self.info.kv_cache](self._session, CacheNames.of(self.config), room)

    def start(self, batch: int) -> OrtStream:
        """Begin ``batch`` empty sequences."""
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        return OrtStream(self, self.new_cache(batch), batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None  # the native session unmaps the weights when its last reference goes


class OrtStream:
    """A batch of sequences fed to an :class:`OrtSession`: its caches and its attention mask so far.

    Attributes:
        mask: [B, columns so far], 1 for a token and 0 for padding.
    """

    def __init__(self, session: OrtSession, cache: KvCacheState, batch: int) -> None:
        self._session = session
        self._cache = cache
        self.mask: IntArray = np.zeros((batch, 0), np.int64)

    def step(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Append tokens; see :meth:`l4convert.runtime.runner.Stream.step`.

        Raises:
            InputError: A token outside the vocabulary, or ONNX Runtime failed.
            UsageError: The stream would become longer than the session's ``max_length``.
        """
        new = check_step(input_ids, mask, self.mask.shape[0])
        self._check_room(input_ids)
        lengths = self.mask.sum(axis=1)
        self.mask = np.concatenate([self.mask, new], axis=1)
        input_ids = np.ascontiguousarray(input_ids, np.int64)
        if self._session.info.calls == "any":
            return self._run(input_ids, self.mask)
        result: FloatArray = np.zeros((*input_ids.shape, self._session.config.vocab_size), np.float32)
        for call in in_place_calls(lengths, new, self._session.config.attention_chunk_size):
            call.put(self._run(call.take(input_ids), call.attention_mask()), result)
        return result

    def _run(self, input_ids: IntArray, mask: IntArray) -> FloatArray:
        """One call of the graph: logits [B,S,vocabulary]."""
        try:
            logits = self._cache.run({"input_ids": input_ids, "attention_mask": mask})
        except Exception as error:  # onnxruntime's exception types are private and differ between versions
            summary = _summary(error)
            file = self._session.info.path / MODEL_FILE
            raise InputError(f"{file}: ONNX Runtime failed: {summary}") from error
        expected = (*input_ids.shape, self._session.config.vocab_size)
        if logits.shape != expected:
            raise InputError(
                f"{self._session.info.path / MODEL_FILE}: logits have shape {logits.shape}, not {expected}"
            )
        return logits

    def _check_room(self, input_ids: IntArray) -> None:
        check_vocabulary(input_ids, self._session.config.vocab_size)
        length = self.mask.shape[1] + input_ids.shape[1]
        if length > self._session.max_length:
            raise UsageError(
                f"the text needs {length} positions and the session has {self._session.max_length}",
                f"Open it with a larger maximum length; the model has {self._session.config.max_position_embeddings}.",
            )


_SUMMARY_CHARS = 240


def load_model(
    model: Path,
    threads: int | None = None,
    *,
    optimized: bool = True,
    cpu_form: bool = False,
    fuse_quantized: bool = True,
    provider: Provider = "cpu",
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        model: Path of ``model.onnx``.
        threads: Threads for one operator; default: ONNX Runtime's choice.
        optimized: Whether ONNX Runtime may rewrite the graph; False: every node runs as it is written.
        fuse_quantized: Whether it may fuse DequantizeLinear with what follows. It does so even where no kernel takes
            FP8, and looks in the wrong graph for weights that a loop uses (1.31).
        cpu_form: Whether the graph computes in bfloat16, or has kernels that only CUDA has, and so has to be rewritten
            (l4convert/runtime/cpu_form.py).
        provider: Where it runs; the CPU takes what another provider has no kernel for.

    Raises:
        InputError: The file is absent or ONNX Runtime refuses it.
        BackendMissing: onnxruntime is not installed, or has no such provider, or there is no GPU.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise backend_missing("onnxruntime") from error
    if not model.is_file():
        raise InputError(f"{model}: no such file", "Convert the checkpoint again.")
    prepare(onnxruntime, provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors become exceptions, and are not printed as well
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if not fuse_quantized:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    source: str | bytes = str(model)
    if cpu_form:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
        source = cpu_form_of(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=list(PROVIDERS[provider]))
    except Exception as error:  # as above
        summary = _summary(error)
        hint = "`l4convert verify` tells whether the artifact is whole; `l4convert doctor` which ONNX Runtime is here."
        raise InputError(f"{model}: ONNX Runtime cannot load it: {summary}", hint) from error
    check_started(session, provider)
    return session


def _check_contract(info: ArtifactInfo, session: Any) -> dict[str, CacheElements]:
    """Compare the graph's inputs and outputs with the contract; give the elements of each cache by its input's name."""
    file, names = info.path / MODEL_FILE, CacheNames.of(info.config)
    inputs = {value.name: value for value in session.get_inputs()}
    expected = {"input_ids", "attention_mask", *names.past}
    _check_names(file, "input", set(inputs), expected)
    _check_names(file, "output", {value.name for value in session.get_outputs()}, {"logits", *names.present})
    types = {inputs[name].type for name in names.past}
    caches = {name: cache_elements(inputs[name].type, names.head_dim) for name in names.past}
    known = {name: elements for name, elements in caches.items() if elements is not None}
    if len(known) != len(caches) or mixed_types(types):
        raise InputError(
            f"{file}: caches of type {', '.join(sorted(types))}, expected one floating type, one quantized type, or"
            " both in different layers"
        )
    for name, elements in known.items():
        shape = inputs[name].shape
        # A dimension that the graph leaves open is a name here, and fits anything.
        if len(shape) != 4 or any(
            isinstance(d, int) and d != s for d, s in ((shape[1], names.heads), (shape[3], elements.width))
        ):
            raise InputError(
                f"{file}: input {name} has shape {shape}, the manifest says {names.heads} heads of {elements.width}"
            )
    return known


def _check_names(file: Path, kind: str, found: set[str], expected: set[str]) -> None:
    for problem, names in (("misses", expected - found), ("has an unexpected", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            hint = "Was it written by another program, or for another model than its manifest says?"
            raise InputError(f"{file}: the graph {problem} {kind} {min(names)}{more}", hint)


def _summary(error: Exception) -> str:
    """What ONNX Runtime says, on one line and without the C++ signatures in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text if len(text) <= _SUMMARY_CHARS else f"...{text[-_SUMMARY_CHARS:]}"
