"""What every checkpoint format is read into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.remote import HubSource
from l4convert.checkpoint.text import is_address, show

if TYPE_CHECKING:
    from l4convert.checkpoint.adapters.applied import AppliedAdapter

Experts = Literal["stacked", "unfused"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes were all checked and of which no weight was read yet.

    Attributes:
        path: The folder it lies in.
        format: Name of the row of ``FORMATS`` that read it.
        config: The text decoder's hyperparameters.
        tensors: Canonical name (see :mod:`l4convert.checkpoint.names`) to tensor (BF16, F16 or F32), in model order.
            Those that are stored quantized are F32, exactly (:mod:`l4convert.checkpoint.prequantized`).
        experts: ``stacked``: one [E, in, out] tensor a projection; ``unfused``: one [out, in] weight an expert.
        sidecars: Tokenizer, config and chat template files, to be copied into the artifact.
        files: Every file that decides the result (config, index, weights), for digests.
        adapters: Those that were merged into the tensors, in their order; their files are not among ``files``.
        hub: Where it came from, where that is the Hugging Face Hub; ``path`` is then a folder of its cache.
        quantization: How the checkpoint stores its weights quantized, in words; None: it does not.
        generated: Name to content of files that an artifact needs and the checkpoint lacks, written like sidecars.
    """

    path: Path
    format: str
    config: DecoderConfig
    tensors: Mapping[str, LazyTensor]
    experts: Experts
    sidecars: tuple[Path, ...]
    files: tuple[Path, ...]
    adapters: tuple[AppliedAdapter, ...] = ()
    quantization: str | None = None
    generated: Mapping[str, bytes] = field(default_factory=dict)
    hub: HubSource | None = None

    @property
    def title(self) -> str:
        """What a user calls it: its folder, or its address with the commit."""
        shown = show(self.path)  # a folder of Hugging Face's cache has the address as its name
        return shown if is_address(shown) else str(self.path)

    @property
    def name(self) -> str:
        """The same in short: a folder's own name."""
        return self.title if is_address(self.title) else self.path.name


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Attributes:
        name: Short name, shown by ``inspect``.
        detect: Whether a folder looks like this format; reads file names only, never raises.
        open: Reads and checks everything but the weights themselves.
        looks_like: What ``detect`` looks for, in words, for the message when no format fits.
    """

    name: str
    detect: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
    looks_like: str
