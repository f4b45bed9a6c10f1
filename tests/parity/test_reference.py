from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM

from l4convert.errors import BackendMissing, InputError
from l4convert.parity.reference import TransformersReference
from tests.checkpoints import MAVERICK, write_random_checkpoint

IDS = np.random.default_rng(4).integers(3, 128, 30)


@pytest.fixture(scope="module")
def expected(scout_layout: Path) -> np.ndarray:
    model: Any = Llama4ForCausalLM.from_pretrained(scout_layout, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray = model.eval()(torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    return logits


@pytest.mark.parametrize("options", [{}, {"unfused": True, "shards": 2}, {"conditional": True}], ids=str)
def test_every_form_of_a_checkpoint_gives_the_same_logits(
    options: dict[str, Any], tmp_path: Path, expected: np.ndarray
) -> None:
    with TransformersReference(write_random_checkpoint(tmp_path / "checkpoint", **options)) as reference:
        np.testing.assert_allclose(reference.logits(IDS), expected, atol=1e-5)


def test_unfused_maverick_equals_its_stacked_twin(tmp_path: Path) -> None:
    stacked = TransformersReference(write_random_checkpoint(tmp_path / "stacked", **MAVERICK))
    unfused = TransformersReference(write_random_checkpoint(tmp_path / "unfused", unfused=True, **MAVERICK))
    np.testing.assert_allclose(unfused.logits(IDS), stacked.logits(IDS), atol=1e-5)


def test_a_stream_gives_each_row_what_it_gets_alone(scout_layout: Path, expected: np.ndarray) -> None:
    with TransformersReference(scout_layout) as reference:
        stream = reference.start(2)
        first = stream.step(np.stack([IDS[:5], [0, 0, *IDS[:3]]]), np.array([[1] * 5, [0, 0, 1, 1, 1]]))
        second = stream.step(np.stack([IDS[5:7], [IDS[3], 0]]), np.array([[1, 1], [1, 0]]))
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), expected[:7], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([first[1, 2:], second[1, :1]]), expected[:4], atol=1e-5)


# 30 tokens are four chunks of 8: steps that end at boundaries, that cross one or several, and single tokens around.
STEPS = ([8, 8, 8, 6], [16, 14], [1, 3, 5, 2, 11, 8], [7, 1, 1, 6, 1, 1, 1, 12], [1] * 30, [30], [29, 1])


@pytest.mark.parametrize("layout", ["scout_layout", "maverick_layout"])
@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_steps_with_a_cache_give_what_one_eager_pass_gives(
    sizes: list[int], layout: str, request: pytest.FixtureRequest
) -> None:
    with TransformersReference(request.getfixturevalue(layout)) as reference:
        stream, parts = reference.stream(), np.split(IDS, np.cumsum(sizes)[:-1])
        stepped = [stream.step(part) for part in parts]
        at_once = reference.logits(IDS)  # eager again, in between and without a trace
        np.testing.assert_allclose(np.concatenate(stepped), at_once, atol=2e-6 * np.abs(at_once).max())


def test_chunked_layers_of_a_stream_keep_less_than_a_chunk(scout_layout: Path) -> None:
    with TransformersReference(scout_layout) as reference:
        stream = reference.stream()
        for part in np.split(IDS, 6):
            stream.step(part)
        assert [layer.keys.shape[2] for layer in stream._cache.layers] == [7, 7, 7, 30]


def test_exact_angles_do_not_drift_with_the_position(scout_layout: Path, expected: np.ndarray) -> None:
    far = 4_000_000  # a multiple of the chunk size, 8
    own, exact = (TransformersReference(scout_layout, exact_angles=choice) for choice in (False, True))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(exact.logits(IDS), expected, atol=2e-6 * scale)
    np.testing.assert_allclose(exact.shifted(IDS, far), expected, atol=2e-6 * scale)
    np.testing.assert_array_equal(own.shifted(IDS, 0), own.logits(IDS))
    assert np.abs(own.shifted(IDS, far) - expected).max() > 1e-4 * scale
    assert "float64" in exact.name
    assert "float64" not in own.name


def test_nothing_is_printed(scout_layout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TransformersReference(scout_layout)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_checkpoint_is_an_input_error(scout_layout: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scout_layout, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        TransformersReference(copy)


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra_the_message_is_the_install_command(
    module: str, scout_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendMissing, match="pip install torch transformers"):
        TransformersReference(scout_layout)


def test_a_published_spelling_that_transformers_refuses_is_read(
    scout_layout: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    """The configs of the hub say 4 for the true of attn_temperature_tuning; transformers 5 wants a boolean."""
    old = tmp_path / "old"
    shutil.copytree(scout_layout, old)
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    (old / "config.json").write_text(json.dumps(config | {"attn_temperature_tuning": 4}), encoding="utf-8")
    np.testing.assert_array_equal(TransformersReference(old).logits(IDS), expected)


def test_a_model_without_chunks_needs_no_size_of_them(scout_layout: Path, tmp_path: Path) -> None:
    """transformers makes the mask of chunked layers whether there are any or not, and fails without their size."""
    config = json.loads((scout_layout / "config.json").read_text(encoding="utf-8"))
    logits = []
    for size in (None, len(IDS)):
        path = tmp_path / str(size)
        shutil.copytree(scout_layout, path)
        changes = {"attention_chunk_size": size, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
        (path / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        logits.append(TransformersReference(path).logits(IDS))
    np.testing.assert_array_equal(*logits)


def test_a_config_that_transformers_refuses_is_an_input_error(scout_layout: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(scout_layout, old)
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    (old / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": "much"}), encoding="utf-8")
    with pytest.raises(InputError, match="transformers cannot load it"):
        TransformersReference(old)
