"""Compare an artifact with the reference: every window of a text in one call, and the ways of splitting it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.errors import InputError, UsageError
from l4convert.parity.by_length import TextComparison
from l4convert.parity.feeding import feed
from l4convert.parity.metrics import NO_TARGET, Comparison, measure
from l4convert.parity.notes import batch_notes, runner_notes, source_notes, text_notes
from l4convert.parity.outcome import ParityReport, SplitRow, TextUsed
from l4convert.parity.policy import ELEMENTWISE, Policy, default_policy
from l4convert.parity.reference import Reference, TransformersReference
from l4convert.parity.splits import Split, batch_splits, boundaries, one_call, single_row_splits
from l4convert.progress import NO_PROGRESS, Progress, Task
from l4convert.runtime.engine_session import EngineSession
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.open import ON_CPU, RunWith
from l4convert.runtime.runner import FloatArray, IntArray, Runner
from l4convert.runtime.tokenizer import TextTokenizer

DEFAULT_TOKENS = 3000
DEFAULT_WINDOW = 1000
_RANDOM_SEED = 0
# What decides the function that is computed and does not show in the shapes of the weights.
_FUNCTION = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "rms_norm_eps",
    "attention_chunk_size", "rope_theta", "rope_scaling", "use_qk_norm", "attn_temperature_tuning", "floor_scale",
    "attn_scale",
)  # fmt: skip


def validate(
    artifact: Path,
    reference: Path,
    *,
    text: str | None = None,
    text_name: str = "given text",
    policy: Policy | None = None,
    progress: Progress = NO_PROGRESS,
    tokens: int = DEFAULT_TOKENS,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
    run_with: RunWith = ON_CPU,
) -> ParityReport:
    """Measure an artifact against transformers on the checkpoint it was made from, and judge it by a policy.

    The beginning of ``text`` is cut into windows, each of which starts at position 0 (with the beginning-of-text token,
    where the tokenizer puts one). All of them are
    compared in one call each; the first one also by every other split, and parts of the text as padded batches.

    Args:
        artifact: The folder that ``convert`` wrote.
        reference: The checkpoint's folder.
        text: What to run on; None: random tokens, which prove equality but say little about quality.
        text_name: What to call it in the report.
        policy: Thresholds; default: the bundled ones of the artifact's recipe.
        progress: Where to report.
        tokens: The most tokens to use, over all windows.
        window: Tokens in a window. Memory is a few times ``window`` * vocabulary * 4 bytes.
        threads: For ONNX Runtime.
        run_with: What runs the artifact.

    Returns:
        A report; look at its ``passed``.

    Raises:
        InputError: The artifact, checkpoint or text cannot be used, or the two models differ in size.
        UsageError: A window or number of tokens that makes no sense.
        BackendMissing: torch, transformers or what is to run the artifact is not installed, or there is no GPU.
    """
    info = read_artifact(artifact)
    limit = info.config.max_position_embeddings
    if not 2 <= window <= limit or tokens < 2:
        raise UsageError(
            f"cannot use windows of {window} in {tokens} tokens: both are at least 2, a window at most {limit}"
        )
    policy = (
        policy
        if policy is not None
        else default_policy(info.recipe, info.schemes, info.target, info.compute, info.kv_scheme)
    )
    windows, used = prepare_text(info, text, tokens, window, text_name)
    with progress.task("Loading the reference", total=1, unit="models") as task:
        model = TransformersReference(reference)
        task.advance(1)
    with model, run_with.open(artifact, max_length=window, threads=threads) as session:
        _check_same_model(info.config, model.checkpoint.config, artifact, reference)
        report = compare(
            session,
            model,
            windows,
            info=info,
            used=used,
            policy=policy,
            faults=config_faults(info.config, model.checkpoint.config),
            progress=progress,
            max_batch=session.max_batch if isinstance(session, EngineSession) else None,
        )
        notes = (*report.notes, *source_notes(artifact, model.checkpoint), *runner_notes(session))
        return replace(report, notes=notes)


def prepare_text(
    info: ArtifactInfo, text: str | None, tokens: int, window: int, text_name: str = "given text"
) -> tuple[list[IntArray], TextUsed]:
    """The windows of token ids to run on, and what the report says about them.

    Raises:
        InputError: The text has fewer than two tokens.
    """
    if text is None:
        source = f"random tokens (seed {_RANDOM_SEED})"
        prefix: tuple[int, ...] = ()
        random = np.random.Generator(np.random.PCG64(_RANDOM_SEED))
        ids = random.integers(0, info.config.vocab_size, tokens)
    else:
        tokenizer = TextTokenizer.open(info.path)
        source, prefix = text_name, tokenizer.prefix_ids
        ids = np.array(tokenizer.encode(text, special=False), np.int64)
    # Every window begins as a text would, and what it begins with counts as tokens too.
    own = max(1, window - len(prefix))
    ids = ids[: tokens - len(prefix) * -(-tokens // window)]
    windows = [np.concatenate([np.array(prefix, np.int64), ids[at : at + own]]) for at in range(0, len(ids), own)]
    windows = [part for part in windows if len(part) >= 2]
    if not windows:
        raise InputError(f"the text has {len(ids)} tokens, at least two are needed", "Pass a longer one with --text.")
    return windows, TextUsed(source, text is None, sum(len(part) for part in windows), len(windows), window)


def compare(
    artifact: Runner,
    reference: Reference,
    windows: Sequence[IntArray],
    *,
    info: ArtifactInfo,
    used: TextUsed,
    policy: Policy,
    faults: Sequence[str] = (),
    progress: Progress = NO_PROGRESS,
    max_batch: int | None = None,
) -> ParityReport:
    """Run everything and judge it; see :func:`validate`.

    Args:
        artifact: What is judged.
        reference: What it is compared with.
        windows: Texts [tokens], the longest first.
        info: The artifact's manifest.
        used: What ``windows`` are, for the report.
        policy: The thresholds.
        faults: What fails the comparison whatever its numbers are, such as those of :func:`config_faults`.
        progress: Where to report.
        max_batch: The most texts that the artifact's runner takes at once; None: any number.
    """
    chunk = info.config.attention_chunk_size
    single = single_row_splits(len(windows[0]), chunk)
    batches = batch_splits(len(windows[0]), chunk)
    batch = tuple(split for split in batches if max_batch is None or len(split.lengths) <= max_batch)
    alone = sum(batch[0].lengths) if batch else 0
    total = used.tokens + len(windows[0]) * len(single) + alone * (1 + len(batch))
    with progress.task("Comparing", total=total, unit="tokens") as task:
        comparer = _Comparer(artifact, reference, policy, chunk, info.config.pad_token_id or 0, task)
        text = TextComparison(max(map(len, windows)))
        first, *others = comparer.rows(windows, single, batch, text)
    rows = (replace(first, failures=(*faults, *first.failures)), *others)
    return ParityReport(
        artifact=info.path.name,
        reference=reference.name,
        recipe=info.recipe,
        target=info.target,
        kv_cache=info.kv_cache,
        text=used,
        policy=policy,
        rows=rows,
        by_length=text.by_length.rows(),
        notes=(*text_notes(used, len(windows[0]), chunk), *batch_notes(batches, batch, max_batch)),
    )


@dataclass(frozen=True)
class _Text:
    """One text [tokens] and its logits [tokens, vocabulary]: the reference's, and the artifact's in one call."""

    ids: IntArray
    reference: FloatArray
    own: FloatArray

    @property
    def targets(self) -> IntArray:
        """The next token of each token, [tokens]."""
        return np.append(self.ids[1:], NO_TARGET)


class _Comparer:
    """One validation under way: the two models, and what every comparison needs."""

    def __init__(
        self, artifact: Runner, reference: Reference, policy: Policy, chunk: int, pad_id: int, task: Task
    ) -> None:
        self._artifact = artifact
        self._reference = reference
        self._policy = policy
        self._chunk = chunk
        self._pad_id = pad_id
        self._task = task

    def rows(
        self, windows: Sequence[IntArray], single: Sequence[Split], batch: Sequence[Split], comparison: TextComparison
    ) -> Iterator[SplitRow]:
        """Every window in one call, the first one by the splits ``single``, parts of all by the splits ``batch``."""
        first = self._measure(windows[0])
        comparison.add(0, measure(first.reference, first.own, first.targets))
        for ids in windows[1:]:
            text = self._measure(ids)
            comparison.add(0, measure(text.reference, text.own, text.targets))
        yield self._whole(windows, comparison.whole)
        for split in single:
            yield self._split(split, [first])
        if batch:
            texts = [self._measure(ids) for ids in spread(windows, batch[0].lengths)]
            for split in batch:
                yield self._split(split, texts)

    def _measure(self, ids: IntArray) -> _Text:
        reference = self._reference.logits(ids)
        (piece,) = feed(self._artifact, [ids], one_call(len(ids)), self._pad_id)
        self._task.advance(len(ids))
        return _Text(ids, reference, piece.logits)

    def _whole(self, windows: Sequence[IntArray], comparison: Comparison) -> SplitRow:
        metrics = comparison.result()
        failures = (*metrics.problems(), *self._policy.reference.broken_by(metrics))
        crossed = sum(boundaries(len(ids), self._chunk) for ids in windows)
        return SplitRow("one call", "every window at once", len(windows), crossed, metrics, None, failures)

    def _split(self, split: Split, texts: Sequence[_Text]) -> SplitRow:
        against_reference, drifted = Comparison(), Comparison()
        for piece in feed(self._artifact, [text.ids for text in texts], split, self._pad_id):
            text, tokens = texts[piece.row], piece.tokens
            against_reference.update(text.reference[tokens], piece.logits, text.targets[tokens])
            drifted.update(text.own[tokens], piece.logits)
            self._task.advance(len(piece.logits))
        metrics, drift = against_reference.result(), drifted.result()
        failures = (
            *metrics.problems(),
            *self._policy.reference.broken_by(metrics, only=ELEMENTWISE),
            *(f"drift from one call: {line}" for line in (*drift.problems(), *self._policy.drift.broken_by(drift))),
        )
        crossed = sum(boundaries(length, self._chunk) for length in split.lengths)
        return SplitRow(split.name, split.description, len(split.calls), crossed, metrics, drift, failures)


def spread(windows: Sequence[IntArray], lengths: Sequence[int]) -> list[IntArray]:
    """Texts of the given lengths from different places, so that a row that sees another's tokens shows."""
    ids = np.concatenate(windows)
    last = max(1, len(lengths) - 1)
    return [ids[(len(ids) - length) * row // last :][:length] for row, length in enumerate(lengths)]


def config_faults(ours: DecoderConfig, theirs: DecoderConfig) -> tuple[str, ...]:
    """What makes the two compute different functions of the same weights.

    A threshold that forgives quantization would forgive, say, another RoPE base as well: the models are compared first.
    """
    differing = [name for name in _FUNCTION if getattr(ours, name) != getattr(theirs, name)]
    faults = [f"{name} is {getattr(theirs, name)} in the reference, {getattr(ours, name)} here" for name in differing]
    layers = [i for i, (our, their) in enumerate(zip(ours.layers, theirs.layers, strict=True)) if our != their]
    return (*faults, *(f"layer {i} is {theirs.layers[i]} in the reference, {ours.layers[i]} here" for i in layers))


def _check_same_model(ours: DecoderConfig, theirs: DecoderConfig, artifact: Path, reference: Path) -> None:
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_local_experts"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{reference}: {name} is {getattr(theirs, name)}, and {getattr(ours, name)} in {artifact}",
                "Compare with the checkpoint that the artifact was made from.",
            )
