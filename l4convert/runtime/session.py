"""Run an artifact with ONNX Runtime, through the I/O contract of DESIGN section 5."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.write import MODEL_FILE
from l4convert.errors import InputError, UsageError
from l4convert.runtime.cache_elements import CacheElements, cache_elements, mixed_types
from l4convert.runtime.caches import (
    CACHE_FORMS,
    CacheNames,
    CacheRoom,
    CacheSource,
    KvCacheState,
    restored_slots,
)
from l4convert.runtime.history import TokenHistory
from l4convert.runtime.loading import Loading, load_model, summary
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.occupancy import Columns, Occupancy, Slots
from l4convert.runtime.providers import PROVIDERS, Provider
from l4convert.runtime.runner import FloatArray, IntArray
from l4convert.runtime.stream import OrtStream

# How long a stream may become in the static form where the caller does not say: enough for a conversation, and small
# beside the weights (Scout: 0.8 GB of float32 caches).
DEFAULT_MAX_LENGTH = 4096
# Weights of an artifact whose packed experts are unpacked once; those of larger ones are, layer by layer, in each call.
_FOLDED_BYTES = 256 << 20


class OrtSession:
    """A loaded artifact; :meth:`open` makes one, :meth:`start` begins a batch of sequences.

    Attributes:
        info: The artifact's manifest.
        max_length: How many tokens a sequence can have.
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
        profile: Path | None = None,
    ) -> Self:
        """Load an artifact.

        Args:
            artifact: The folder that ``convert`` wrote.
            max_length: Tokens to make room for in the static form. Default: 4096, or all the model's positions where
                they are fewer. The other forms grow and take this as a limit only where it is given.
            threads: Threads for one operator; default: ONNX Runtime's choice.
            provider: The execution provider: ``cpu`` or ``cuda``.
            profile: How the path of a profile begins that is written by :meth:`end_profile`; None: no profile.

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
        loading = Loading(
            threads=threads,
            fuse_quantized=info.calls == "any",  # graphs of the other runtimes are lowered to what this one fuses well
            folded=info.target != "tensorrt" or _weights_bytes(artifact) <= _FOLDED_BYTES,
            cpu_form=provider == "cpu" and (info.compute == "bfloat16" or info.target == "cuda"),
            provider=provider,
            profile=profile,
        )
        session = load_model(artifact / MODEL_FILE, loading)
        return cls(info, session, max_length or default, provider)

    @property
    def name(self) -> str:
        """The artifact's folder name, and where it runs unless that is the CPU."""
        return self.info.path.name if self.provider == "cpu" else f"{self.info.path.name}, {PROVIDERS['cuda'][0]}"

    @property
    def config(self) -> DecoderConfig:
        """The model's hyperparameters."""
        return self.info.config

    def end_profile(self) -> Path:
        """Write what every call since :meth:`open` took, node by node (Chrome's trace format); that file."""
        return Path(self._session.end_profiling())

    def start(self, batch: int) -> OrtStream:
        """Begin ``batch`` empty sequences."""
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        cache = CACHE_FORMS[self.info.kv_cache](self._session, CacheNames.of(self.config), self._room(batch))
        return self._stream(cache, np.zeros(batch, np.int64))

    def restore(self, lengths: IntArray, caches: CacheSource) -> OrtStream:
        """Go on where the caches of other sequences end, whoever made them.

        Args:
            lengths: Tokens that each row has, [B].
            caches: Called for each cache input of the graph, in order, as ``caches(name, shape, dtype)``; gives the
                array of that shape [B, kv_heads, slots, width], contiguous, which becomes the cache itself on a CPU
                and is not copied. In the static form a token's slot is its position, in chunked layers its position
                mod C. In the others a row's last token is in the last slot, the one before it in the slot before, and
                so on; in the windowed form chunked layers have as many slots as the row of the longest chunk needs.
                Slots without a token must hold finite numbers.

        Raises:
            ValueError: Lengths that are negative, or an array of another shape or type.
            UsageError: A row is longer than the session's ``max_length``.
        """
        lengths = np.asarray(lengths, np.int64)
        if lengths.ndim != 1 or not lengths.size or (lengths < 0).any():
            raise ValueError(f"lengths are {lengths.tolist()}, expected one that is not negative for each row")
        if lengths.max() > self.max_length:
            raise UsageError(f"a sequence of {lengths.max()} tokens, and the session has room for {self.max_length}")
        names, room = CacheNames.of(self.config), self._room(len(lengths))
        slots = restored_slots(self.info.kv_cache, names, lengths, room)
        values = [room.filled(names, name, count, caches) for name, count in zip(names.past, slots, strict=True)]
        return self._stream(CACHE_FORMS[self.info.kv_cache](self._session, names, room, values), lengths)

    def run(self, cache: KvCacheState, input_ids: IntArray, mask: IntArray) -> FloatArray:
        """One call of the graph, for streams.

        Args:
            cache: The caches, which are brought up to date.
            input_ids: [B, S]; ``mask``: [B, past + S].

        Returns:
            Logits [B, S, vocabulary].

        Raises:
            InputError: ONNX Runtime failed.
        """
        try:
            logits = cache.run({"input_ids": np.ascontiguousarray(input_ids), "attention_mask": mask})
        except Exception as error:  # onnxruntime's exception types are private and differ between versions
            raise InputError(f"{self.info.path / MODEL_FILE}: ONNX Runtime failed: {summary(error)}") from error
        expected = (*input_ids.shape, self.config.vocab_size)
        if logits.shape != expected:
            raise InputError(f"{self.info.path / MODEL_FILE}: logits have shape {logits.shape}, not {expected}")
        return logits

    def _room(self, batch: int) -> CacheRoom:
        return CacheRoom(batch, self.max_length, self._cache_elements, self.provider)

    def _stream(self, cache: KvCacheState, lengths: IntArray) -> OrtStream:
        chunk = self.config.attention_chunk_size
        occupancy: Occupancy
        if self.info.kv_cache == "static":
            occupancy = Slots(lengths, chunk)
        else:
            columns = int(lengths.max())
            occupancy = Columns((np.arange(columns) >= columns - lengths[:, None]).astype(np.int64), chunk)
        return OrtStream(self, cache, occupancy, TokenHistory(lengths))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None  # the native session unmaps the weights when its last reference goes


def _weights_bytes(artifact: Path) -> int:
    return sum(file.stat().st_size for file in artifact.glob("*.safetensors"))


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
