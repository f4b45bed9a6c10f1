from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.emit import source_digests
from l4convert.errors import InputError, UsageError
from l4convert.parity import ParityReport, Policy, Thresholds, compare, default_policy, load_policy, validate
from l4convert.parity.at_once import spread
from l4convert.parity.outcome import TextUsed, write_report
from l4convert.parity.validate import prepare_text
from l4convert.runtime import ArtifactInfo
from tests.artifacts import KV_CACHES, write_canonical_artifact
from tests.checkpoints import MAVERICK, write_random_checkpoint
from tests.parity.fakes import CHUNK, Counter, Fake, Fault
from tests.runtime.byte_tokenizer import TEMPLATE, write_tokenizer

ROWS = ["one call", "odd splits", "whole chunks", "token by token", "batch, left padding", "batch, right padding"]


@pytest.fixture
def info(scout_layout: Path) -> ArtifactInfo:
    """Vocabulary 128, chunks of 8."""
    config = open_checkpoint(scout_layout).config
    return ArtifactInfo(scout_layout, "growing", "none", frozenset(), "portable", config, "float32", "any")


def run(
    info: ArtifactInfo, fault: Fault | None = None, policy: Policy | None = None, bad_reference: bool = False
) -> ParityReport:
    random = np.random.default_rng(3)
    windows = [random.integers(0, 128, 60), random.integers(0, 128, 60), random.integers(0, 128, 41)]
    used = TextUsed("test", random=False, tokens=161, windows=3, window=60)
    reference = Fake()
    if bad_reference:
        reference.logits = lambda ids: np.full((len(ids), 128), np.nan, np.float32)
    policy = policy or default_policy("none", (), "portable")
    return compare(Fake(fault), reference, windows, info=info, used=used, policy=policy)


def failed_rows(report: ParityReport) -> set[str]:
    return {row.name for row in report.rows if not row.passed}


def test_equal_models_pass_every_row(info: ArtifactInfo) -> None:
    report = run(info)
    assert report.passed
    assert not report.failures
    assert [row.name for row in report.rows] == ROWS
    assert report.whole.tokens == 161
    assert report.whole.scored == 158
    assert report.rows[0].boundaries == 7 + 7 + 5
    assert all(row.boundaries > 0 for row in report.rows)
    assert all(row.drift is not None and row.drift.max_abs_logit == 0 for row in report.rows[1:])


def small_error(_: Fake, rows: list[list[int]], logits: np.ndarray) -> None:
    logits += 0.01 * np.sin(np.arange(logits.shape[-1]))


def nan_in_third_chunk(_: Fake, rows: list[list[int]], logits: np.ndarray) -> None:
    if len(rows[0]) > 2 * CHUNK and logits.shape[1] == 1:
        logits[0, -1, 5] = np.nan


def wrong_after_short_calls(_: Fake, rows: list[list[int]], logits: np.ndarray) -> None:
    if logits.shape[1] == 1 and len(rows[0]) % CHUNK == 1:
        logits[:] = np.roll(logits, 1, axis=-1)


def rows_leak(_: Fake, rows: list[list[int]], logits: np.ndarray) -> None:
    if len(rows) > 1:
        logits[1] += 0.05 * np.nan_to_num(logits[0, -1])


def crossing_calls_are_wrong(_: Fake, rows: list[list[int]], logits: np.ndarray) -> None:
    end = len(rows[0])
    start = end - logits.shape[1]
    if start % CHUNK and start // CHUNK != (end - 1) // CHUNK and len(rows) == 1:
        logits[0, -1] *= 1.01


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (small_error, set(ROWS)),
        (nan_in_third_chunk, {"odd splits", "token by token", "batch, left padding", "batch, right padding"}),
        (wrong_after_short_calls, {"odd splits", "token by token", "batch, left padding", "batch, right padding"}),
        (rows_leak, {"batch, left padding", "batch, right padding"}),
        (crossing_calls_are_wrong, {"odd splits", "token by token"}),
    ],
)
def test_faults_are_found_in_the_rows_that_show_them(fault: Fault, expected: set[str], info: ArtifactInfo) -> None:
    report = run(info, fault)
    assert not report.passed
    assert failed_rows(report) <= expected
    assert failed_rows(report) & (expected - {"one call"})
    assert all(reason.split(":")[0] in expected for reason in report.failures)


def test_a_coarse_artifact_passes_a_coarse_policy_but_must_agree_with_itself(info: ArtifactInfo) -> None:
    policy = Policy("coarse", Thresholds(mean_kl=1.0), Thresholds(mean_kl=1e-6))
    assert run(info, small_error, policy).passed  # the same error in every split: quantization
    report = run(info, wrong_after_short_calls, policy)
    assert not report.passed
    assert all("drift from one call: mean_kl" in reason for reason in report.failures)


def test_a_reference_that_gives_nan_fails_everything(info: ArtifactInfo) -> None:
    report = run(info, policy=Policy("lax", Thresholds(), Thresholds()), bad_reference=True)
    assert failed_rows(report) == set(ROWS)
    assert any("reference gave NaN" in reason for reason in report.failures)


def test_a_report_of_nothing_does_not_pass(info: ArtifactInfo) -> None:
    report = dataclasses.replace(run(info), rows=())
    assert not report.passed
    assert report.failures == ("nothing was compared",)


def test_progress_ends_at_its_total(info: ArtifactInfo) -> None:
    counter = Counter()
    ids = np.arange(60)
    used = TextUsed("test", random=False, tokens=60, windows=1, window=60)
    compare(Fake(), Fake(), [ids], info=info, used=used, policy=default_policy("none", (), "cpu"), progress=counter)
    assert counter.done == counter.total > 0


def test_windows_that_cross_no_boundary_are_noted(info: ArtifactInfo) -> None:
    used = TextUsed("test", random=False, tokens=8, windows=1, window=8)
    policy = Policy("any", Thresholds(), Thresholds())
    report = compare(Fake(), Fake(), [np.arange(8)], info=info, used=used, policy=policy)
    assert any("No chunk boundary was crossed" in note for note in report.notes)


def test_a_text_shorter_than_a_window_is_noted(info: ArtifactInfo) -> None:
    windows, used = prepare_text(info, None, tokens=30, window=1000)
    policy = Policy("any", Thresholds(), Thresholds())
    report = compare(Fake(), Fake(), windows, info=info, used=used, policy=policy)
    assert "The longest window has 30 tokens, not 1000: there were no more." in report.notes


def test_batch_rows_come_from_different_places() -> None:
    texts = spread([np.arange(50), np.arange(50, 100)], (30, 20, 10))
    assert [(text[0], text[-1]) for text in texts] == [(0, 29), (40, 59), (90, 99)]


def test_windows_start_as_texts_do_and_use_no_more_tokens_than_asked(info: ArtifactInfo, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TEMPLATE)  # token 0 begins a text
    info = dataclasses.replace(info, path=tmp_path)
    windows, used = prepare_text(info, "the quick brown fox jumps over the lazy dog " * 20, tokens=25, window=10)
    assert [len(window) for window in windows] == [10, 10, 5]
    assert all(window[0] == 0 for window in windows)
    assert (used.tokens, used.windows, used.random) == (25, 3, False)


def test_random_tokens_stand_in_for_a_text_and_are_noted(info: ArtifactInfo) -> None:
    windows, used = prepare_text(info, None, tokens=25, window=10)
    again, _ = prepare_text(info, None, tokens=25, window=10)
    assert used.random
    assert "random" in used.source
    assert [len(window) for window in windows] == [10, 10, 5]
    assert all((a == b).all() for a, b in zip(windows, again, strict=True))


def test_a_text_without_two_tokens_is_an_input_error(info: ArtifactInfo, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    info = dataclasses.replace(info, path=tmp_path)
    for text in ("", "t"):
        with pytest.raises(InputError, match="at least two"):
            prepare_text(info, text, tokens=100, window=10)


@pytest.mark.parametrize("form", KV_CACHES)
def test_an_unquantized_artifact_equals_transformers_in_every_split(
    form: str, scout_layout: Path, tmp_path: Path
) -> None:
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact", form)
    report = validate(artifact, scout_layout, tokens=150, window=70)
    assert report.passed, report.failures
    assert [row.name for row in report.rows] == ROWS
    assert max(row.metrics.max_rel_logit for row in report.rows) < 1e-5
    write_report(report, artifact / "parity.json")
    saved = json.loads((artifact / "parity.json").read_text())
    assert saved["schema"] == "l4convert.parity/1"
    assert saved["passed"] is True
    assert saved["text"]["random"] is True
    assert saved["rows"][0]["reference"]["tokens"] == 150


def test_an_artifact_of_other_weights_fails(scout_layout: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", seed=1)
    report = validate(write_canonical_artifact(other, tmp_path / "artifact"), scout_layout, tokens=100, window=50)
    assert not report.passed
    assert report.whole.mean_kl > 0.01


def test_an_artifact_of_another_model_is_refused(scout_layout: Path, tmp_path: Path) -> None:
    other = write_random_checkpoint(tmp_path / "other", **MAVERICK | {"vocab_size": 160})
    with pytest.raises(InputError, match="vocab_size is 128, and 160 in"):
        validate(write_canonical_artifact(other, tmp_path / "artifact"), scout_layout, tokens=100, window=50)


@pytest.mark.parametrize(("tokens", "window"), [(1, 10), (10, 1), (10, 5000)])
def test_sizes_that_make_no_sense_are_refused(tokens: int, window: int, scout_layout: Path, tmp_path: Path) -> None:
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact")
    with pytest.raises(UsageError, match="windows of"):
        validate(artifact, scout_layout, tokens=tokens, window=window)


def test_a_policy_file_decides(scout_layout: Path, tmp_path: Path) -> None:
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact")
    file = tmp_path / "strict.toml"
    file.write_text('schema = "l4convert.policy/1"\n[reference]\nmin_tokens = 100000\n')
    report = validate(artifact, scout_layout, policy=load_policy(file, "portable"), tokens=60, window=30)
    assert not report.passed
    assert report.failures == ("one call: tokens is 60, the policy wants at least 100000",)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_chunk_size", 7), ("rms_norm_eps", 2e-5), ("floor_scale", 999), ("no_rope_layers", [1, 1, 1, 1])],
)
def test_a_reference_of_another_function_fails_whatever_the_policy(
    key: str, value: object, scout_layout: Path, tmp_path: Path
) -> None:
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact")
    other = tmp_path / "other"
    shutil.copytree(scout_layout, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    config.pop("layer_types", None)
    (other / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
    lenient = Policy("lenient", Thresholds(max_kl=1e9), Thresholds())
    report = validate(artifact, other, policy=lenient, tokens=40, window=20)
    assert not report.passed
    assert "in the reference" in report.failures[0]


def test_other_weight_files_are_noted(scout_layout: Path, tmp_path: Path) -> None:
    source = {"files": source_digests(open_checkpoint(scout_layout).files)}
    artifact = write_canonical_artifact(scout_layout, tmp_path / "artifact", source=source)
    other = write_random_checkpoint(tmp_path / "other", seed=99)
    same, different = (validate(artifact, path, tokens=40, window=20) for path in (scout_layout, other))
    assert not any("digests differ" in note for note in same.notes)
    assert "digests differ" in different.notes[-1]
