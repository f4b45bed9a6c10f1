"""Meta's own Llama 4 (``llama_models``) as the reference for checkpoints in Meta's format: float32, on the CPU.

Meta's code is written for GPUs under ``torchrun``. Here it runs in one process of a gloo group that has no network, and
``Tensor.cuda``, which it calls for its caches, does nothing while a model is made. Names, fused tensors and the parts
of a tensor in several files are its own code's matter: it gets the tensors as they are stored.

Its masks are right only for a text that begins at position 0 (``Transformer.forward`` makes them from the number of new
tokens). So whatever is asked for, the text is computed from its beginning.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import numpy as np

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.meta_shards import is_unused
from l4convert.checkpoint.pth_file import open_pth
from l4convert.errors import InputError, backend_missing, summary_of
from l4convert.parity.meta_scales import dequantized
from l4convert.parity.reference import RecomputingStream
from l4convert.runtime.runner import FloatArray, IntArray

_FIRST_LENGTH = 1024  # of the caches; longer texts make them longer


class MetaReference:
    """``llama_models.llama4.model.Transformer`` on a checkpoint of Meta's format.

    Args:
        checkpoint: Of that format; quantized experts are dequantized by Meta's formulas, activations are not quantized.
        exact_angles: Multiply position and frequency in float64, where Meta's code does so in float32.

    Raises:
        BackendMissing: llama-models, fairscale or torch is not installed.
        InputError: Meta's code does not take the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, *, exact_angles: bool = False) -> None:
        self._torch = _require_backend()
        self.checkpoint = checkpoint
        self.exact_angles = exact_angles
        with gloo():
            self._model: Any = _load(checkpoint)
        self._length = 0
        self._table: Any = None  # of RoPE, [positions, head_dim / 2] complex64
        self._prepare(_FIRST_LENGTH)

    @property
    def name(self) -> str:
        """Library, version and checkpoint."""
        angles = ", angles in float64" if self.exact_angles else ""
        return f"llama-models {version('llama-models')} float32{angles}, {self.checkpoint.path.name}"

    def logits(self, ids: IntArray) -> FloatArray:
        """Logits [tokens, vocabulary] of one text [tokens]: one forward pass from position 0."""
        self._prepare(len(ids))
        return self._run(ids, self._table[: len(ids)])

    def shifted(self, ids: IntArray, start: int) -> FloatArray:
        """:meth:`logits` of a text whose first token RoPE is told to be at position ``start``."""
        self._prepare(len(ids))
        return self._run(ids, self._angles(start, len(ids)))

    def stream(self) -> MetaStream:
        """Begin a text that is fed in steps, each of which computes all of it anew."""
        return MetaStream(self)

    def start(self, batch: int) -> RecomputingStream:
        """Begin ``batch`` empty sequences; every step computes them anew from their beginning, so keep them short."""
        return RecomputingStream(self.logits, batch)

    def _run(self, ids: IntArray, table: Any) -> FloatArray:
        from llama_models.llama4.datatypes import TransformerInput

        self._model.freqs_cis = table
        tokens = self._torch.from_numpy(ids.astype(np.int64))[None]
        with self._torch.no_grad():
            output = self._model(TransformerInput(tokens=tokens, tokens_position=0))
        array: FloatArray = output.logits[0].float().numpy()
        return array

    def _prepare(self, length: int) -> None:
        """Make caches and RoPE's table long enough."""
        if length <= self._length:
            return
        from llama_models.llama4.model import precompute_freqs_cis

        self._length = max(length, 2 * self._length)
        for layer in self._model.layers:
            _, _, heads, width = layer.attention.cache_k.shape
            layer.attention.cache_k = self._torch.zeros(1, self._length, heads, width)
            layer.attention.cache_v = self._torch.zeros(1, self._length, heads, width)
        if self.exact_angles:
            self._table = self._angles(0, self._length)
        else:
            self._table = precompute_freqs_cis(self._width, self._length, *_rope(self._model.args))

    @property
    def _width(self) -> int:
        width: int = self._model.args.dim // self._model.args.n_heads
        return width

    def _angles(self, start: int, count: int) -> Any:
        """Rows of the table, as ``precompute_freqs_cis`` makes them but from any position on; float64 where asked."""
        from llama_models.llama4.model import apply_scaling

        torch, (theta, scaled, factor, high) = self._torch, _rope(self._model.args)
        frequencies = 1.0 / theta ** (torch.arange(0, self._width, 2).float() / self._width)
        if scaled:
            frequencies = apply_scaling(frequencies, factor, high)
        dtype = torch.float64 if self.exact_angles else torch.float32
        angles = torch.outer(torch.arange(start, start + count, dtype=dtype), frequencies.to(dtype))
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None


class MetaStream:
    """A text fed in steps of any sizes; each step computes the whole text so far, because of Meta's masks."""

    def __init__(self, reference: MetaReference) -> None:
        self._reference = reference
        self._ids: IntArray = np.empty(0, np.int64)

    def step(self, ids: IntArray) -> FloatArray:
        """Append tokens [S]; their logits float32 [S, vocabulary]."""
        self._ids = np.concatenate([self._ids, ids])
        return self._reference.logits(self._ids)[len(self._ids) - len(ids) :]


def _require_backend() -> Any:
    try:
        import fairscale  # noqa: F401  # Meta's model imports it
        import torch
        from llama_models.llama4 import model  # noqa: F401  # the functions below use it
    except ImportError as error:
        raise backend_missing("llama_models") from error
    return torch


@contextmanager
def gloo() -> Iterator[None]:
    """One process that is all of a model-parallel group, and ``Tensor.cuda`` that leaves tensors where they are."""
    import torch
    from fairscale.nn.model_parallel import initialize

    distributed: Any = torch.distributed
    with redirect_stdout(io.StringIO()):  # fairscale prints there what it does
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        if not initialize.model_parallel_is_initialized():
            initialize.initialize_model_parallel(1)
    tensor: Any = torch.Tensor
    own, default = tensor.cuda, torch.get_default_dtype()
    tensor.cuda = lambda self, *args, **options: self
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        tensor.cuda = own
        torch.set_default_dtype(default)


def _load(checkpoint: Checkpoint) -> Any:
    import torch
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    params = json.loads((checkpoint.path / "params.json").read_text())
    params = {**(params.get("model") or params), "vision_args": None, "vocab_size": checkpoint.config.vocab_size}
    try:
        args = ModelArgs(**{**params, "max_seq_len": 1, "max_batch_size": 1})
        model: Any = Transformer(args)
        state = _state(checkpoint, args)
        with torch.no_grad():
            loaded = model.load_state_dict(state, strict=False)
    except Exception as error:  # whatever Meta's code raises on what it does not take
        raise InputError(f"{checkpoint.path}: Meta's code cannot load it: {summary_of(error)}") from error
    if loaded.missing_keys or loaded.unexpected_keys:
        odd = min([*loaded.missing_keys, *loaded.unexpected_keys])
        raise InputError(f"{checkpoint.path}: Meta's code does not find its tensors: {odd}")
    return model.eval()


def _state(checkpoint: Checkpoint, args: Any) -> dict[str, Any]:
    """All tensors under Meta's names, put together from the files by Meta's own code."""
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    shards: list[dict[str, Any]] = []
    for file in (file for file in checkpoint.files if file.suffix == ".pth"):
        tensors = {key: as_torch(value) for key, value in open_pth(file).tensors.items() if not is_unused(key)}
        shards.append(dequantized(tensors, checkpoint, len(shards), args))
    if len(shards) == 1:
        return shards[0]
    if args.moe_args is not None:
        shards = [convert_moe_weights(shard, args.moe_args.num_experts) for shard in shards]
    state: dict[str, Any] = reshard_mp(shards, size=1, rank=0)
    return state


def as_torch(tensor: Any) -> Any:
    """A tensor of a file as one of torch, of the same type."""
    import torch

    array = np.ascontiguousarray(tensor.numpy())
    kind: Any = {"BFLOAT16": torch.bfloat16, "FLOAT8E4M3FN": torch.float8_e4m3fn}.get(tensor.dtype.name)
    if kind is None:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.view(np.uint8).copy()).view(kind).reshape(array.shape)


def _rope(args: Any) -> tuple[float, bool, float, float]:
    return args.rope_theta, args.use_scaled_rope, args.rope_scaling_factor, args.rope_high_freq_factor
