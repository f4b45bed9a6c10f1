"""The runner of engines, on a device whose plans are the artifact's own graph in ONNX Runtime: all but CUDA is real."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.runtime import Sampler, SamplingOptions, generate
from l4convert.runtime.runner import last_logits
from tests.artifacts import LENGTH
from tests.runtime.fake_device import CONTEXT, PREFILL, FakeDevice, add_engines, opened

DECODE, PREFILLING = 1, 0  # indices of the profiles
GREEDY = SamplingOptions(temperature=0.0)


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    assert logits.shape == expected.shape
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["whole", "segments"])
def test_one_step_gives_the_logits_of_transformers(
    form: str, built: dict[str, Path], ids: np.ndarray, expected: np.ndarray
) -> None:
    device = FakeDevice()
    with opened(built[form], device) as session:
        assert_close(session.start(1).step(ids[None])[0], expected)
    # 37 tokens in calls that end at the boundaries of chunks of 8, each through every plan.
    widths = [shapes["input_ids"][1] for _, shapes in device.calls if "input_ids" in shapes]
    assert widths == [8, 8, 8, 8, 5]
    assert len(device.calls) == len(widths) * (3 if form == "segments" else 1)


@pytest.mark.parametrize("form", ["whole", "segments"])
@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8))
def test_any_split_gives_the_same(
    form: str, cuts: set[int], built: dict[str, Path], ids: np.ndarray, expected: np.ndarray
) -> None:
    with opened(built[form]) as session:
        stream = session.start(1)
        logits = [stream.step(part[None])[0] for part in np.split(ids, sorted(cuts))]
    assert_close(np.concatenate(logits), expected)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padded_rows_get_what_they_would_get_alone(
    side: str, built: dict[str, Path], ids: np.ndarray, expected: np.ndarray
) -> None:
    mask = np.ones((3, 20), np.int64)
    place = {"left": slice(0, 7), "right": slice(13, 20), "middle": slice(3, 10)}[side]
    mask[1, place] = 0
    mask[2, 1:] = 0
    batch = np.tile(ids[:20], (3, 1))
    batch[1][mask[1] == 1], batch[1, place] = ids[:13], 99
    with opened(built["segments"]) as session:
        stream = session.start(3)
        logits = stream.step(batch, mask)
        assert_close(logits[0], expected[:20])
        assert_close(logits[1][mask[1] == 1], expected[:13])
        assert_close(logits[2][:1], expected[:1])
        following = stream.step(np.array([[ids[20]], [ids[13]], [ids[1]]]))
    for row, position in enumerate((20, 13, 1)):
        assert_close(following[row], expected[position : position + 1])


@pytest.mark.parametrize("form", ["whole", "segments"])
def test_the_logits_of_the_last_tokens_alone(form: str, built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice()
    batch = np.stack([ids, ids[::-1], ids + 1])
    with opened(built[form], device) as session:
        every = session.start(3).step(batch)
        device.copied = 0
        last = last_logits(session.start(3), batch)
    np.testing.assert_array_equal(last, every[:, -1])
    assert device.copied == last.nbytes


def test_the_narrowest_profile_is_chosen_and_wider_steps_are_split(
    scout_layout: Path, tmp_path: Path, artifacts: dict[str, Path], ids: np.ndarray
) -> None:
    artifact = add_engines(shutil.copytree(artifacts["static"], tmp_path / "a"))
    device = FakeDevice()
    with opened(artifact, device) as session:
        session.start(1).step(ids[None, :7])
        session.start(1).step(ids[None, :1])
    assert [profile for profile, _ in device.calls] == [DECODE, DECODE]


def test_a_wide_chunk_is_split_by_the_widest_profile(tmp_path: Path, ids: np.ndarray) -> None:
    from tests.artifacts import write_canonical_artifact
    from tests.checkpoints import write_random_checkpoint

    checkpoint = write_random_checkpoint(tmp_path / "c", attention_chunk_size=64, num_hidden_layers=1)
    artifact = add_engines(write_canonical_artifact(checkpoint, tmp_path / "a", "static"))
    device = FakeDevice()
    with opened(artifact, device) as session:
        session.start(1).step(ids[None])
    widths = [(profile, shapes["input_ids"][1]) for profile, shapes in device.calls]
    assert widths == [(PREFILLING, PREFILL), (PREFILLING, PREFILL), (DECODE, 5)]


def test_decode_steps_have_one_shape_and_are_captured_once(built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice()
    artifact = built["full"]
    with opened(artifact, device) as session:
        stream = session.start(1)
        stream.step(ids[None, :7])
        plain = len(device.calls)
        logits = [stream.step(ids[None, at : at + 1])[0] for at in range(7, 28)]
        assert session.graphs == "decode steps are replayed as a CUDA graph"
    decode = device.calls[plain:]
    assert {tuple(sorted(shapes.items())) for _, shapes in decode[::3]} == {tuple(sorted(decode[0][1].items()))}
    assert decode[0][1]["attention_mask"] == (1, CONTEXT)
    assert [plan.binds for plan in device.plans] == [2, 2, 2]  # once for the prompt, once for all decode steps
    assert (device.captures, device.launches) == (1, 20)
    with opened(artifact, FakeDevice(capturable=False)) as refusing:
        stream = refusing.start(1)
        stream.step(ids[None, :7])
        again = [stream.step(ids[None, at : at + 1])[0] for at in range(7, 28)]
        assert refusing.graphs.startswith("decode steps are enqueued one by one")
    np.testing.assert_array_equal(np.concatenate(logits), np.concatenate(again))


def test_a_decode_step_copies_no_more_than_its_tokens(built: dict[str, Path], ids: np.ndarray) -> None:
    """Ids and one element of the mask for each row; not so after a step with padding, or of another batch."""
    device = FakeDevice()
    written = []
    with opened(built["whole"], device) as session:
        stream = session.start(2)
        for width, mask in ((4, None), (1, None), (1, None), (1, np.array([[1], [0]])), (1, None), (1, None)):
            before = device.written
            stream.step(np.stack([ids, ids])[:, :width], mask)
            written.append(device.written - before)
    whole = 2 * CONTEXT * 8
    small = 2 * 8 + 2 * 8
    assert written == [2 * 4 * 8 + whole, 2 * 8 + whole, small, 2 * 8 + whole, 2 * 8 + whole, small]


def test_a_captured_graph_is_not_used_after_a_call_of_other_shapes(built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice()
    with opened(built["full"], device) as session:
        stream = session.start(1)
        for part in (ids[:1], ids[1:2], ids[2:4], ids[4:5], ids[5:6]):
            stream.step(part[None])
    assert (device.captures, device.launches) == (2, 2)


def test_tensorrt_rtx_replays_itself(built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice(replays=True)
    with opened(built["whole"], device) as session:
        assert session.graphs == "no decode step so far"
        session.start(1).step(ids[None, :1])
        assert session.graphs == "decode steps are replayed as CUDA graphs by TensorRT-RTX"
    assert device.captures == 0
    assert device.plans[0].replay == {DECODE}


def test_tensorrt_rtx_is_not_captured_by_others(built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice(replays=False)
    with opened(built["whole"], device) as session:
        session.start(1).step(ids[None, :1])
        assert session.graphs.startswith("decode steps are enqueued one by one")
    assert device.captures == 0


def test_a_new_batch_starts_with_empty_caches_and_ends_the_old_one(
    built: dict[str, Path], ids: np.ndarray, expected: np.ndarray
) -> None:
    with opened(built["whole"]) as session:
        old = session.start(1)
        old.step(ids[None, 5:])
        new = session.start(2)
        assert_close(new.step(np.stack([ids, ids]))[1], expected)
        with pytest.raises(ValueError, match="another batch"):
            old.step(ids[None, :1])


def test_everything_is_freed(built: dict[str, Path], ids: np.ndarray) -> None:
    device = FakeDevice()
    with opened(built["full"], device) as session:
        session.start(1).step(ids[None, :1])
        caches = sum(len(block) for block in device.memory.values())
        assert caches == session.device_bytes + 1000
    assert device.memory == {}
    assert device.closed
    assert all(plan.closed for plan in device.plans)


def test_generation_is_that_of_the_cpu(built: dict[str, Path], artifacts: dict[str, Path], ids: np.ndarray) -> None:
    from l4convert.runtime import OrtSession

    texts = []
    for runner in (opened(built["segments"]), OrtSession.open(artifacts["static"], max_length=CONTEXT)):
        with runner:
            tokens = generate(runner, ids[:20].tolist(), max_new_tokens=12, sampler=Sampler(GREEDY))
            texts.append(list(tokens))
    assert texts[0] == texts[1]


def test_the_graph_that_the_builder_gets(scout_layout: Path, tmp_path: Path, ids: np.ndarray) -> None:
    """Lowered for TensorRT-RTX, in INT4: with masks as wide as the engine's context, the same bits as without."""
    from l4convert.pipeline import ConvertOptions, convert
    from l4convert.runtime import OrtSession

    out = tmp_path / "rtx"
    convert(
        ConvertOptions(checkpoint=scout_layout, output=out, target="tensorrt-rtx", recipe="int4", compute="float32")
    )
    add_engines(out)
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, 5:20] = 0
    logits = []
    for runner in (opened(out), OrtSession.open(out, max_length=CONTEXT)):
        with runner:
            stream = runner.start(2)
            batch = np.stack([ids, ids])
            steps = [stream.step(batch, mask), *(stream.step(batch[:, at : at + 1]) for at in range(4))]
            logits.append(np.concatenate(steps, axis=1)[np.concatenate([mask, np.ones((2, 4))], axis=1) == 1])
    np.testing.assert_array_equal(*logits)
