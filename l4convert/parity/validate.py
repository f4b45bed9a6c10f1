"""Compare an artifact with the reference: every window of a text at once or in steps, and the ways of splitting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from l4convert.checkpoint.config import DecoderConfig
from l4convert.checkpoint.text import is_address
from l4convert.errors import InputError, UsageError
from l4convert.parity.by_length import TextComparison
from l4convert.parity.notes import (
    batch_notes,
    position_notes,
    runner_notes,
    source_notes,
    step_notes,
    text_notes,
)
from l4convert.parity.open_reference import open_reference
from l4convert.parity.outcome import ParityReport, TextUsed
from l4convert.parity.policy import Policy, default_policy
from l4convert.parity.reference import Reference
from l4convert.parity.steps import is_long
from l4convert.parity.trial import Trial
from l4convert.parity.ways import choose_way
from l4convert.progress import NO_PROGRESS, Progress
from l4convert.runtime.engine_session import EngineSession
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.open import ON_CPU, RunWith
from l4convert.runtime.runner import IntArray, Runner
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
    tokens: int | None = None,
    window: int = DEFAULT_WINDOW,
    threads: int | None = None,
    run_with: RunWith = ON_CPU,
    exact_angles: bool = False,
    adapters: Sequence[Path] = (),
) -> ParityReport:
    """Measure an artifact against transformers on the checkpoint it was made from, and judge it by a policy.

    The beginning of ``text`` is cut into windows, each of which starts at position 0 (with the beginning-of-text token,
    where the tokenizer puts one). All of them are compared in one call each, or in steps where they are too long for
    one; the first one also by every other split, and parts of the text as padded batches.

    Args:
        artifact: The folder that ``convert`` wrote.
        reference: The checkpoint's folder, or its address; then it is downloaded into huggingface_hub's cache.
        text: What to run on; None: random tokens, which prove equality but say little about quality.
        text_name: What to call it in the report.
        policy: Thresholds; default: the bundled ones of the artifact's recipe.
        progress: Where to report.
        tokens: The most tokens to use, over all windows. Default: 3,000, or a window where that is more.
        window: Tokens in a window. Those that are too long for one call (l4convert/parity/steps.py) are fed in steps,
            so that memory grows with the caches only.
        threads: For ONNX Runtime.
        run_with: What runs the artifact.
        exact_angles: Have the reference multiply RoPE's angles in float64, so that it is right at far positions too.
        adapters: Folders of the LoRA adapters that were merged, for the reference to merge them too.

    Returns:
        A report; look at its ``passed``.

    Raises:
        InputError: The artifact, checkpoint or text cannot be used, or the two models differ in size.
        UsageError: A window or number of tokens that makes no sense.
        BackendMissing: torch, transformers or what is to run the artifact is not installed, or there is no GPU.
    """
    info = read_artifact(artifact)
    if is_address(reference):
        from l4convert.checkpoint.hub import local_checkpoint

        reference = local_checkpoint(reference, progress)  # transformers reads whole files
    limit = info.config.max_position_embeddings
    tokens = max(DEFAULT_TOKENS, window) if tokens is None else tokens
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
        model = open_reference(reference, exact_angles=exact_angles, adapters=adapters)
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
            one_stream=isinstance(session, EngineSession),
        )
        notes = (*report.notes, *source_notes(artifact, model.checkpoint), *runner_notes(session))
        if is_long(len(windows[0]), info.config):
            notes += tuple(position_notes(model, windows[0]))
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
    one_stream: bool = False,
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
        one_stream: Whether it has only one stream at a time, so that long windows cannot be fed in several ways side
            by side.
    """
    way = choose_way(windows, info.config, max_batch, one_stream)
    with progress.task("Comparing", total=way.tokens, unit="tokens") as task:
        text = TextComparison(max(map(len, windows)))
        trial = Trial(artifact, reference, policy, info.config, task)
        first, *others = way.rows(trial, text)
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
        notes=(
            *text_notes(used, len(windows[0]), info.config.attention_chunk_size),
            *batch_notes(way, max_batch),
            *step_notes(way, info.config, reference),
        ),
    )


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
