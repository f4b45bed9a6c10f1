"""A small artifact in each form of the cache, and one whose attention is lowered to kernels inside If."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4convert.pipeline import ConvertOptions, convert
from tests.artifacts import KV_CACHES, write_canonical_artifact


@pytest.fixture(scope="package")
def artifacts(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form of the cache -> artifact of ``scout_layout``."""
    folder = tmp_path_factory.mktemp("bench")
    return {form: write_canonical_artifact(scout_layout, folder / form, form) for form in KV_CACHES}


@pytest.fixture(scope="package")
def lowered(scout_layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``scout_layout`` converted for the CPU, static caches."""
    out = tmp_path_factory.mktemp("bench") / "cpu"
    convert(ConvertOptions(checkpoint=scout_layout, output=out, recipe="none", kv_cache="static"))
    return out
