"""What calibration sees is what transformers computes; what a text must be; damage is told by layer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.errors import InputError, UsageError
from l4convert.quantization.kv import KvScheme, scale_name
from l4convert.runtime import calibration
from l4convert.runtime.calibration import CalibrationGraph, calibrate
from l4convert.runtime.calibration_text import CalibrationText, read_calibration_text
from tests.runtime.byte_tokenizer import TEMPLATE, write_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, then the dog sleeps. "


def text_of(ids: np.ndarray) -> CalibrationText:
    return CalibrationText("t.txt", "0", (1,), ids)


def graph_of(artifact: Path, checkpoint: Path, form: str) -> CalibrationGraph:
    return CalibrationGraph(artifact / "model.onnx", open_checkpoint(checkpoint).config, form, "float32", False)


@pytest.fixture(scope="module")
def maxima(scout_layout: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Largest magnitudes that transformers projects: values, keys of global layers, lengths of pairs of other keys."""
    import torch
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(scout_layout, dtype=torch.float32, attn_implementation="eager").eval()
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "v_proj")):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out[0].numpy()}))
    with torch.no_grad():
        model(torch.from_numpy(np.append(1, ids))[None], use_cache=False)
    result = {}
    for layer, config in enumerate(open_checkpoint(scout_layout).config.layers):
        heads = {kind: seen[f"model.layers.{layer}.self_attn.{kind}_proj"].reshape(-1, 2, 16) for kind in "kv"}
        if config.rope:
            key = heads["k"] / np.sqrt((heads["k"] ** 2).mean(axis=-1, keepdims=True) + 1e-5)
            heads["k"] = np.repeat(np.hypot(key[..., 0::2], key[..., 1::2]), 2, axis=-1)
        result[scale_name(layer, "key")] = np.abs(heads["k"]).max(axis=0)
        result[scale_name(layer, "value")] = np.abs(heads["v"]).max(axis=0)
    return result


@pytest.mark.parametrize("form", ["growing", "static"])
@pytest.mark.parametrize("rows", [1024, 5])
def test_scales_are_those_of_the_reference(artifacts, scout_layout, ids, maxima, monkeypatch, form, rows) -> None:
    monkeypatch.setattr(calibration, "_MOST_ROWS", rows)
    graph = graph_of(artifacts[form], scout_layout, form)
    scales = calibrate(graph, KvScheme("fp8", "channel"), text_of(ids))
    assert scales.keys() == maxima.keys()
    for layer, config in enumerate(graph.config.layers):
        for kind in ("key", "value"):
            name = scale_name(layer, kind)
            ratio = scales[name][0, :, 0] * 224 / maxima[name]
            if config.rope and kind == "key":  # a channel is at most as long as its pair, and nearly so somewhere
                assert (ratio <= 1.01).all()
                assert (ratio.reshape(2, 8, 2).max(axis=-1) >= 0.7).all()
            else:
                np.testing.assert_allclose(ratio, 1.004, atol=0.0045)


def test_global_layers_only(artifacts, scout_layout, ids) -> None:
    graph = graph_of(artifacts["growing"], scout_layout, "growing")
    scales = calibrate(graph, KvScheme("int4", "head", "global"), text_of(ids))
    assert list(scales) == ["model.layers.3.self_attn.key_scale", "model.layers.3.self_attn.value_scale"]


def test_windows_and_forms_and_repetitions_agree(artifacts, scout_layout, ids, monkeypatch) -> None:
    graph = graph_of(artifacts["growing"], scout_layout, "growing")
    scheme = KvScheme("int8", "channel")
    one = calibrate(graph, scheme, text_of(ids))
    again = calibrate(graph, scheme, text_of(ids))
    static = calibrate(graph_of(artifacts["static"], scout_layout, "static"), scheme, text_of(ids))
    monkeypatch.setattr(calibration, "LEAST_WINDOW", 1)  # two chunks of 8
    windows = calibrate(graph, scheme, text_of(ids))
    for name, scale in one.items():
        assert scale.tobytes() == again[name].tobytes()
        np.testing.assert_allclose(static[name], scale, rtol=0.01)
        assert windows[name].shape == scale.shape
    assert any((windows[name] != one[name]).any() for name in one)


def test_nan_names_the_layer(artifacts, scout_layout, ids, monkeypatch) -> None:
    graph = graph_of(artifacts["growing"], scout_layout, "growing")
    honest = calibration.host_array
    calls = []

    def damaged(value: Any) -> np.ndarray:
        calls.append(value)
        return honest(value) * (np.nan if len(calls) == 6 else 1)  # key, value of layers 0, 1, 2

    monkeypatch.setattr(calibration, "host_array", damaged)
    with pytest.raises(InputError, match="a value of layer 2 is NaN or infinite"):
        calibrate(graph, KvScheme("int8"), text_of(ids))


def test_windows_fit_into_the_memory_for_caches(artifacts, scout_layout, monkeypatch) -> None:
    graph = graph_of(artifacts["growing"], scout_layout, "growing")
    assert graph.token_bytes == 2 * (2 * 4 * 2 * 16) * 4
    assert graph.window == calibration.LEAST_WINDOW
    monkeypatch.setattr(calibration, "CACHE_BYTES", 100 * graph.token_bytes)
    assert graph.window == 100
    assert graph.rows(100) == calibration._MOST_ROWS
    assert graph.rows(10_000_000) == 1


def test_text(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "ckpt", TEMPLATE)
    file = tmp_path / "notes.txt"
    file.write_text(TEXT * 40, encoding="utf-8")
    text = read_calibration_text(file, folder, 150, 300)
    assert text.to_dict() == {
        "file": "notes.txt",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tokens": 150,
    }
    windows = list(text.windows(64))
    assert [len(window) for window in windows] == [64, 64, 25]
    assert {int(window[0]) for window in windows} == set(text.prefix) == {0}
    np.testing.assert_array_equal(np.concatenate([window[1:] for window in windows]), text.ids)


def test_a_long_text_is_not_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tokenizer(tmp_path / "ckpt", TEMPLATE)
    file = tmp_path / "long.txt"
    file.write_text("é" * 3_000_000, encoding="utf-8")  # blocks of 1 MiB end within characters
    taken = []
    tokenizer = calibration.CalibrationText.__module__
    monkeypatch.setattr(
        f"{tokenizer}.TextTokenizer.encode", lambda _self, text, special: taken.append(len(text)) or [3] * 200
    )
    text = read_calibration_text(file, folder, 100, 300)
    assert taken == [6400]
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "notes.txt: No such file or directory"),
        (b"\xff\xfe" + b"a" * 1000, "notes.txt: not UTF-8: invalid start byte"),
        (b"a" * 1000 + b"\xc3", "notes.txt: not UTF-8: unexpected end of data"),
        (b"too short", "tokens are too few to calibrate on"),
        (b"", "notes.txt: 0 tokens are too few"),
    ],
)
def test_unusable_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = write_tokenizer(tmp_path / "ckpt", TEMPLATE)
    if content is not None:
        (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_calibration_text(tmp_path / "notes.txt", folder, 4096, 300)


def test_unusable_options(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "ckpt", TEMPLATE)
    (tmp_path / "notes.txt").write_text(TEXT * 40)
    with pytest.raises(UsageError, match="99 tokens are too few"):
        read_calibration_text(tmp_path / "notes.txt", folder, 99, 300)
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        read_calibration_text(tmp_path / "notes.txt", folder, 150, 100)
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        read_calibration_text(tmp_path / "notes.txt", tmp_path, 150, 300)
