"""One decode step at Scout's last position is what float64 says of it, and float64 says what transformers does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM

from tests.benchmarks.scripts import load

float64_step = load("float64_step")
far_decode = load("far_decode")


@pytest.mark.parametrize("layout", ["scout_layout", "maverick_layout"])
@pytest.mark.parametrize("position", [3, 16, 21])
def test_float64_is_what_transformers_computes(
    layout: str, position: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a chunk of 8, at the beginning of one and in the third; the past is transformers' own."""
    monkeypatch.setattr(float64_step, "BLOCK", 5)  # so that there are several
    path: Path = request.getfixturevalue(layout)
    model = float64_step.Model.open(path)
    ids = np.random.default_rng(0).integers(3, 128, position + 1)
    peer = Llama4ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = peer(torch.from_numpy(ids)[None], use_cache=False).logits[0, -1].numpy()
        cache = peer(torch.from_numpy(ids[:-1])[None], use_cache=True).past_key_values
    past = []
    for layer, held in enumerate(cache.layers):
        keys, values = (held.keys[0].numpy().astype(np.float64), held.values[0].numpy().astype(np.float64))
        if model.config["no_rope_layers"][layer]:
            keys = model.rotate(keys, -np.arange(position - keys.shape[1], position))
            visible = position % 8
            keys, values = keys[:, keys.shape[1] - visible :], values[:, values.shape[1] - visible :]
        past.append(float64_step.Past(keys, values))
    logits = model.step(int(ids[-1]), position, past)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_last_position_of_scout(tmp_path: Path) -> None:
    """1 of 4 layers is global, with one head of width 8: 0.67 GB of caches."""
    artifact, checkpoint = far_decode.make_artifact(tmp_path, None)
    model = float64_step.Model.open(checkpoint)
    near = far_decode.far_step(artifact, model, 100_000)
    far = far_decode.far_step(artifact, model, 10_485_759)
    assert far["lengths"] == [10_485_760]
    assert far["cache_bytes"] == {"global": 10_485_760 * 8 * 2 * 4, "chunked": 3 * 8192 * 8 * 2 * 4}
    assert near["error"] <= 1e-5
    assert far["error"] <= 1e-5
    assert far["same_token"]
    assert far["repeat_error"] <= 1e-6  # the step was undone in between
    # Every million tokens matters: were one left out or seen twice, the error would be of this size.
    assert min(min(mass[:-1]) for mass in far["mass"].values()) > 0.02
