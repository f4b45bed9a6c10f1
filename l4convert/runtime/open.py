"""Open an artifact with whatever is to run it: ONNX Runtime on the CPU or a GPU, or an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from l4convert.errors import UsageError
from l4convert.runtime.engine_session import EngineSession
from l4convert.runtime.providers import Provider
from l4convert.runtime.session import OrtSession


@dataclass(frozen=True)
class RunWith:
    """What is to run an artifact.

    Attributes:
        engine: Name of the hardware profile whose engine to run; None: ONNX Runtime.
        provider: Its execution provider; None: the CPU.
        plugins: The plugin library of the engine, where it is no longer where the engine was built with it.

    Raises:
        UsageError: Engine and provider are given, or plugins without an engine.
    """

    engine: str | None = None
    provider: Provider | None = None
    plugins: Path | None = None

    def __post_init__(self) -> None:
        if self.engine is not None and self.provider is not None:
            raise UsageError("--engine and --provider exclude each other: an engine does not need ONNX Runtime")
        if self.plugins is not None and self.engine is None:
            raise UsageError("--plugins is for engines: name one with --engine")

    def open(
        self,
        artifact: Path,
        *,
        max_length: int | None = None,
        threads: int | None = None,
        open_engine: Callable[..., EngineSession] = EngineSession.open,
    ) -> OrtSession | EngineSession:
        """Load an artifact; see the two sessions for what ``max_length`` and ``threads`` mean and what is raised.

        ``open_engine`` is there to be replaced where there is no GPU.
        """
        if self.engine is not None:
            return open_engine(artifact, hardware=self.engine, max_length=max_length, plugins=self.plugins)
        return OrtSession.open(artifact, max_length=max_length, threads=threads, provider=self.provider or "cpu")


ON_CPU = RunWith()
"""ONNX Runtime's CPU provider."""
