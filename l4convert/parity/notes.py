"""What a reader of a report should know to believe its numbers, one sentence a note."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit import adapter_digests, read_manifest, source_digests
from l4convert.emit.manifest import same_sources
from l4convert.frontend.rope import inverse_frequencies
from l4convert.parity.in_steps import InSteps
from l4convert.parity.meta_reference import MetaReference
from l4convert.parity.metrics import Comparison
from l4convert.parity.open_reference import CheckpointReference
from l4convert.parity.outcome import TextUsed
from l4convert.parity.splits import boundaries
from l4convert.parity.steps import reference_steps
from l4convert.parity.ways import Way
from l4convert.runtime.engine_session import EngineSession
from l4convert.runtime.runner import IntArray
from l4convert.runtime.session import OrtSession

_WEIGHTS = (".safetensors", ".pth", ".pt")
_PROBE = 512  # tokens on which the reference is compared with itself


def text_notes(used: TextUsed, length: int, chunk: int) -> Iterator[str]:
    """What a text cannot show: quality where it is random, chunk boundaries where it is short."""
    if used.random:
        yield f"The text is {used.source}: equality is measured, perplexity and KL on real text are not."
    if length < used.window:
        yield f"The longest window has {length} tokens, not {used.window}: there were no more."
    if boundaries(length, chunk) == 0:
        yield (
            f"No chunk boundary was crossed: windows have {length} tokens and chunks {chunk}. "
            f"Use windows of more than {chunk} tokens to compare across one."
        )


def batch_notes(way: Way, max_batch: int | None) -> Iterator[str]:
    """Which comparisons were left out because the runner takes fewer texts at once."""
    if way.too_many:
        texts = way.too_many
        yield f"Padded batches were not compared: they have {texts} texts, and what ran takes {max_batch} at once."


def step_notes(way: Way, config: DecoderConfig, reference: object) -> Iterator[str]:
    """How long windows were fed to the artifact and to the reference."""
    if isinstance(way, InSteps):
        length = len(way.windows[0])
        how = (
            "each of which computed the text anew from its beginning"
            if isinstance(reference, MetaReference)
            else "with its own cache and scaled_dot_product_attention"
        )
        yield (
            f"Windows of {length} tokens are too long for one call: the reference was fed them in steps of at most "
            f"{max(reference_steps(length, config))} tokens, {how}."
        )
        if way.beginning:
            yield (
                f"The other splits are those of the first {len(way.beginning.windows[0])} tokens: what ran has one "
                "stream at a time."
            )


def position_notes(reference: CheckpointReference, ids: IntArray) -> Iterator[str]:
    """How far the reference is off by itself at the end of a long window [tokens].

    A text is given positions of the last chunk instead of the first. RoPE is relative and a text of one chunk sees
    nothing else of its position, so exactly nothing would change.
    """
    config = reference.checkpoint.config
    last = (len(ids) - 1) // config.attention_chunk_size * config.attention_chunk_size
    if reference.exact_angles or last == 0:
        return
    text = ids[: min(_PROBE, config.attention_chunk_size)]
    comparison = Comparison()
    comparison.update(reference.logits(text), reference.shifted(text, last))
    found = comparison.result()
    library = reference.name.partition(" ")[0]
    yield (
        f"{library} multiplies RoPE's angles in float32, which is off by up to {_angle_error(config, last):.1e} "
        f"radians at position {last}. Of {len(text)} tokens said to be there, its logits differ by "
        f"{found.max_rel_logit:.1e} (relative), KL {found.mean_kl:.1e}, from those of the same tokens at position 0, "
        "where nothing but rounding should. The artifact's angles have no such error; --exact-angles takes it out of "
        "the reference."
    )


def _angle_error(config: DecoderConfig, position: int) -> float:
    """The largest rounding error of ``position * frequency`` in float32 in the chunk from ``position`` on."""
    frequencies = inverse_frequencies(config).astype(np.float32)
    places = np.arange(position, position + min(_PROBE, config.attention_chunk_size))[:, None]
    rounded = places.astype(np.float32) * frequencies
    return float(np.abs(rounded - places * frequencies.astype(np.float64)).max())


def runner_notes(session: OrtSession | EngineSession) -> Iterator[str]:
    """Where it ran, unless that was ONNX Runtime's CPU provider."""
    if isinstance(session, EngineSession):
        yield f"Run by {session.name}; {session.graphs}."
    elif session.provider != "cpu":
        yield f"Run by {session.name}."


def source_notes(artifact: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """A remark where the reference is not made of the files of the manifest.

    A copy in another dtype or other shards may well be the same model, so this is no failure; but the reader must know.
    """
    source = read_manifest(artifact).get("source")
    files = source.get("files") if isinstance(source, dict) else None
    recorded = (
        {name: entry for name, entry in files.items() if name.endswith(_WEIGHTS)} if isinstance(files, dict) else {}
    )
    found = source_digests([file for file in checkpoint.files if file.name.endswith(_WEIGHTS)])
    if recorded and not same_sources(recorded, found):
        yield "The reference's weight files are not those that the artifact was made from: their digests differ."
    yield from _adapter_notes(artifact, checkpoint)


def _adapter_notes(artifact: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """A remark where other adapters were merged into the reference than into the artifact."""
    entries = read_manifest(artifact).get("adapters", [])
    recorded = [entry.get("files") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    if recorded != [adapter_digests(adapter) for adapter in checkpoint.adapters]:
        ours, theirs = len(recorded), len(checkpoint.adapters)
        yield (
            f"The adapters merged into the reference ({theirs}) are not those merged into the artifact ({ours}): "
            "give the same ones with --adapter, in the same order."
        )
