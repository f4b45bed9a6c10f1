"""A hub on loopback that this process believes in, with an empty cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from l4convert.checkpoint.hub import faults
from tests.hub.server import Hub, serving

REPO = "some-org/tiny-llama-4"
Serve = Callable[..., Hub]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serve a folder as the only model of the hub."""
    with ExitStack() as stack:

        def start(folder: Path, repo: str = REPO) -> Hub:
            hub = stack.enter_context(serving(Hub(repo, folder)))
            believe(hub, tmp_path / "hf", monkeypatch)
            return hub

        yield start


def believe(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub, which reads its variables when it is imported, take this hub for the real one."""
    default = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    http = importlib.import_module("huggingface_hub.utils._http")
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + default)
    monkeypatch.setattr(http, "_HUB_ORIGINS", {http._url_origin(hub.endpoint)})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(faults, "WAITS", (0.01,) * 4)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    close_session()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """The same for the command line."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
