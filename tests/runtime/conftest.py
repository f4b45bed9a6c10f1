"""One small artifact in each form of the cache, a text, and what transformers says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.artifacts import KV_CACHES, LENGTH, write_canonical_artifact
from tests.runtime.fake_device import add_engines


@pytest.fixture(scope="session")
def artifacts(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form of the cache -> artifact of ``scout_layout``."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {form: write_canonical_artifact(scout_layout, folder / form, form) for form in KV_CACHES}


@pytest.fixture(scope="session")
def built(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> an artifact with engines: the whole decoder, three segments, and these for full TensorRT."""
    made = {}
    full = {"builder": {"name": "tensorrt", "version": "10.14.1"}}
    for name, cuts, changes in (("whole", (), {}), ("segments", (1, 3), {}), ("full", (1, 3), full)):
        made[name] = tmp_path_factory.mktemp("built") / name
        shutil.copytree(artifacts["static"], made[name])
        add_engines(made[name], cuts=cuts, **changes)
    return made


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(3, 128, LENGTH)


@pytest.fixture(scope="session")
def expected(scout_layout: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM.from_pretrained(scout_layout, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return logits
