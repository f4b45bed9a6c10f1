"""Checkpoints of every layout that a pass may meet."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from l4convert.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import MAVERICK, write_random_checkpoint


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    """Layout to checkpoint; all have 4 layers and chunks of 8."""
    root = tmp_path_factory.mktemp("layouts")
    options = {
        "scout": {},
        "maverick": dict(MAVERICK),
        "top-2": {"num_experts_per_tok": 2},
        "unfused": {"unfused": True},
        "unfused maverick, top-2": {**MAVERICK, "unfused": True, "num_experts_per_tok": 2},
        "tied with biases": {"tie_word_embeddings": True, "attention_bias": True},
        "all global": {"no_rope_layers": [0, 0, 0, 0]},
    }
    return {name: open_checkpoint(write_random_checkpoint(root / name, **kw)) for name, kw in options.items()}  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def scout(layouts: Mapping[str, Checkpoint]) -> Checkpoint:
    return layouts["scout"]


@pytest.fixture(scope="session")
def unfused(layouts: Mapping[str, Checkpoint]) -> Checkpoint:
    return layouts["unfused"]
