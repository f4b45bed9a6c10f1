"""One small artifact in each form of the cache, a text, and what transformers says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Llama4ForCausalLM

from tests.artifacts import KV_CACHES, LENGTH, write_canonical_artifact
from tests.runtime.fake_device import add_engines
from tests.runtime.following import Logits


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
def expected(reference: Logits, ids: np.ndarray) -> np.ndarray:
    return reference([ids.tolist()])[0]


@pytest.fixture(scope="session")
def reference(scout_layout: Path) -> Logits:
    """Logits of whole texts by transformers, in one batch: causal, so padding behind a text changes nothing of it."""
    model = transformers_model(scout_layout)

    def logits(texts: list[list[int]]) -> list[np.ndarray]:
        batch = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.int64)
        for row, tokens in enumerate(texts):
            batch[row, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad():
            output = model(batch, use_cache=False).logits.numpy()
        return [output[row, : len(tokens)] for row, tokens in enumerate(texts)]

    return logits


def transformers_model(checkpoint: Path) -> Any:
    return Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
