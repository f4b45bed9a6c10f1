"""What a reader of a report should know to believe its numbers, one sentence a note."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from l4convert.checkpoint import Checkpoint
from l4convert.emit import read_manifest, source_digests
from l4convert.parity.outcome import TextUsed
from l4convert.parity.splits import Split, boundaries
from l4convert.runtime.engine_session import EngineSession
from l4convert.runtime.session import OrtSession

_WEIGHTS = ".safetensors"


def text_notes(used: TextUsed, length: int, chunk: int) -> Iterator[str]:
    """What a text cannot show: quality where it is random, chunk boundaries where it is short."""
    if used.random:
        yield f"The text is {used.source}: equality is measured, perplexity and KL on real text are not."
    if boundaries(length, chunk) == 0:
        yield (
            f"No chunk boundary was crossed: windows have {length} tokens and chunks {chunk}. "
            f"Use windows of more than {chunk} tokens to compare across one."
        )


def batch_notes(wanted: Sequence[Split], done: Sequence[Split], max_batch: int | None) -> Iterator[str]:
    """Which comparisons were left out because the runner takes fewer texts at once."""
    if len(done) < len(wanted):
        texts = max(len(split.lengths) for split in wanted)
        yield f"Padded batches were not compared: they have {texts} texts, and what ran takes {max_batch} at once."


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
    if recorded and recorded != source_digests([file for file in checkpoint.files if file.suffix == _WEIGHTS]):
        yield "The reference's weight files are not those that the artifact was made from: their digests differ."
