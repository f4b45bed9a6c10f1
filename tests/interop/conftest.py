"""The artifacts that the clients load, each made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop.artifacts import Case, make_case

MakeCase = Callable[[str, str], Case]


@pytest.fixture(scope="session", params=["nano", "tiny_scout"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MakeCase:
    """Function from (recipe, kv_cache) to a converted checkpoint."""
    checkpoint: Path = request.getfixturevalue(request.param)

    @functools.cache
    def make(recipe: str, kv_cache: str) -> Case:
        folder = tmp_path_factory.mktemp(f"{request.param}_{recipe}_{kv_cache}") / "artifact"
        return make_case(checkpoint, folder, recipe=recipe, kv_cache=kv_cache)

    return make
