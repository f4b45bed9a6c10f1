"""One small artifact in each form of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.artifacts import KV_CACHES, write_canonical_artifact


@pytest.fixture(scope="session")
def artifacts(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form of the cache -> artifact of ``scout_layout``."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {form: write_canonical_artifact(scout_layout, folder / form, form) for form in KV_CACHES}
