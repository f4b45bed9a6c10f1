"""The reference: transformers' Llama 4, float32, on the CPU. Nothing of it is ours.

Texts that fit into memory go through eager attention in one forward pass, without a cache. Longer ones are fed in
steps, with the cache that transformers itself would choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from l4convert.checkpoint import Checkpoint, open_checkpoint
from l4convert.checkpoint.hf_config import QUANTIZATION_KEYS
from l4convert.errors import InputError, L4Error, backend_missing, summary_of
from l4convert.parity.reference_adapters import merge_with_peft
from l4convert.parity.reference_weights import state_dict
from l4convert.runtime.runner import FloatArray, IntArray, Runner, check_step


class ReferenceStream(Protocol):
    """One text that is being fed to a reference, step by step."""

    def step(self, ids: IntArray) -> FloatArray:
        """Append tokens [S]; their logits [S, vocabulary]."""
        ...


class Reference(Runner, Protocol):
    """A runner that can also give the logits of a whole text without any cache."""

    def logits(self, ids: IntArray) -> FloatArray:
        """Logits [tokens, vocabulary] of one text [tokens], from one forward pass."""
        ...

    def stream(self) -> ReferenceStream:
        """Begin a text of any length."""
        ...


class TransformersReference:
    """``Llama4ForCausalLM`` on a checkpoint (the text part of a multimodal one).

    Args:
        source: The checkpoint, or its folder, in Hugging Face format.
        exact_angles: Multiply position and frequency in float64. transformers does so in float32, which at position p
            rounds the angle by up to p * 2**-24 radians; nothing else of it is changed.

    Raises:
        BackendMissing: torch or transformers is not installed.
        InputError: The checkpoint is not whole, or not one that transformers reads.
    """

    def __init__(self, source: Path | Checkpoint, *, exact_angles: bool = False) -> None:
        self._torch = _require_backend()
        self.checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
        self.exact_angles = exact_angles
        self._attention = "eager"
        self._model: Any = load_transformers(self.checkpoint)
        if exact_angles:
            _use_exact_angles(self._model.model.rotary_emb)

    @property
    def name(self) -> str:
        """Library, version and checkpoint."""
        import transformers

        angles = ", angles in float64" if self.exact_angles else ""
        merged = "".join(f", adapter {adapter.path.name} merged by peft" for adapter in self.checkpoint.adapters)
        return f"transformers {transformers.__version__} eager float32{angles}, {self.checkpoint.name}{merged}"

    def logits(self, ids: IntArray) -> FloatArray:
        """Logits [tokens, vocabulary] of one text [tokens]: one forward pass, no cache, no padding."""
        return self._run("eager", ids, use_cache=False)

    def stream(self) -> TransformersStream:
        """Begin a text that is fed in steps; see :class:`TransformersStream`."""
        from transformers import DynamicCache

        # With the config, a chunked layer keeps the last C - 1 tokens and the masks know it.
        return TransformersStream(self._run, DynamicCache(config=self._model.config))

    def shifted(self, ids: IntArray, start: int) -> FloatArray:
        """:meth:`logits` of a text whose first token is said to be at position ``start``, a multiple of the chunk size.

        In exact arithmetic that changes nothing: only RoPE sees the positions, and RoPE is relative. So what changes is
        the error that the reference makes at such positions.
        """
        positions = self._torch.arange(start, start + len(ids))[None]
        return self._run("eager", ids, use_cache=False, position_ids=positions)

    def _run(self, attention: str, ids: IntArray, **options: Any) -> FloatArray:
        if attention != self._attention:
            self._model.set_attn_implementation(attention)
            self._attention = attention
        with self._torch.no_grad():
            output = self._model(input_ids=self._torch.from_numpy(ids.astype(np.int64))[None], **options)
        array: FloatArray = output.logits[0].float().numpy()
        return array

    def start(self, batch: int) -> RecomputingStream:
        """Begin ``batch`` empty sequences; every step computes them anew from their beginning, so keep them short."""
        return RecomputingStream(self.logits, batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model = None


class TransformersStream:
    """A text fed in steps of any sizes, by transformers' own code: its cache, its masks, and PyTorch's
    ``scaled_dot_product_attention``, which does not hold the scores of a step at once as eager attention does.

    Args:
        run: Calls the model with an attention implementation, token ids [S] and more arguments; gives logits.
        cache: A ``DynamicCache`` made with the model's config.
    """

    def __init__(self, run: Callable[..., FloatArray], cache: Any) -> None:
        self._run = run
        self._cache = cache

    def step(self, ids: IntArray) -> FloatArray:
        """Append tokens [S]; their logits float32 [S, vocabulary]."""
        return self._run("sdpa", ids, past_key_values=self._cache, use_cache=True)


class RecomputingStream:
    """A stream without a cache: each row is computed alone, from its first token, at every step.

    This is what batches and caches are meant to be equal to. Logits at padding are 0.
    """

    def __init__(self, logits: Callable[[IntArray], FloatArray], batch: int) -> None:
        self._logits = logits
        self._rows: list[IntArray] = [np.zeros(0, np.int64)] * batch

    def step(self, input_ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """See :meth:`l4convert.runtime.runner.Stream.step`."""
        mask = check_step(input_ids, mask, len(self._rows))
        outputs: dict[int, FloatArray] = {}
        for row in np.flatnonzero(mask.any(axis=1)).tolist():
            tokens = input_ids[row][mask[row] == 1]
            self._rows[row] = np.concatenate([self._rows[row], tokens])
            outputs[row] = self._logits(self._rows[row])[-len(tokens) :]
        vocabulary = max((output.shape[1] for output in outputs.values()), default=0)
        result = np.zeros((*input_ids.shape, vocabulary), np.float32)
        for row, output in outputs.items():
            result[row, mask[row] == 1] = output
        return result


def _require_backend() -> Any:
    try:
        import torch
    except ImportError as error:
        raise backend_missing("torch") from error
    try:
        import transformers  # noqa: F401  # the functions below use it
    except ImportError as error:
        raise backend_missing("transformers") from error
    return torch


def load_transformers(checkpoint: Checkpoint, dtype: str = "float32", attention: str | None = "eager") -> Any:
    """``Llama4ForCausalLM``, in evaluation mode, with every weight from the checkpoint.

    Args:
        checkpoint: In Hugging Face format.
        dtype: Name of the torch type to compute in.
        attention: Name of the implementation; None: what transformers takes by itself.

    Raises:
        BackendMissing: torch or transformers is not installed.
        InputError: The checkpoint is not whole, or not one that transformers reads.
    """
    _require_backend()
    with _quiet():
        return _load(checkpoint, dtype, attention)


def _load(checkpoint: Checkpoint, dtype: str, attention: str | None) -> Any:
    import torch
    import transformers

    if checkpoint.format != "hf":
        hint = "Compare with the same weights in Hugging Face format."
        raise InputError(
            f"{checkpoint.path}: transformers cannot read a checkpoint of format {checkpoint.format}", hint
        )
    load: Any = transformers.Llama4ForCausalLM.from_pretrained
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        config = _text_config(checkpoint.path)
        state = state_dict(checkpoint)
        if state is None:
            model, loading = load(str(checkpoint.path), config=config, local_files_only=True, **options)
        else:
            model, loading = load(None, config=config, state_dict=state, **options)
    except L4Error:
        raise
    except Exception as error:  # whatever transformers raises on a config or a file that it does not take
        raise InputError(f"{checkpoint.path}: transformers cannot load it: {summary_of(error)}") from error
    missing = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    if missing:
        raise InputError(f"{checkpoint.path}: transformers finds no weight for {min(missing)}")
    return merge_with_peft(model.eval(), checkpoint)


def _use_exact_angles(rotary: Any) -> None:
    """Have a ``Llama4TextRotaryEmbedding`` compute its angles in float64, from its own frequencies."""
    import torch

    def forward(x: Any, position_ids: Any) -> Any:
        angles = position_ids[..., None].double() * rotary.inv_freq.to(x.device).double()
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64) * rotary.attention_scaling

    rotary.forward = forward


def _text_config(path: Path) -> Any:
    """The text decoder's config as transformers reads it.

    transformers 4.51, and with it the configs that Llama 4 was published with, wrote 4 for the true of
    ``attn_temperature_tuning``; transformers 5 refuses a number there.
    """
    from transformers import Llama4TextConfig

    values, _ = Llama4TextConfig.get_config_dict(str(path), local_files_only=True)
    text = dict(values.get("text_config") or values)
    for key in QUANTIZATION_KEYS:  # the state dict has the weights dequantized
        text.pop(key, None)
    if type(text.get("attn_temperature_tuning")) is int:
        text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    config = Llama4TextConfig.from_dict(text)
    if config.attention_chunk_size is None:  # no layer is chunked, but a mask is made for chunked ones all the same
        config.attention_chunk_size = config.max_position_embeddings
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from warning about what is checked here."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
