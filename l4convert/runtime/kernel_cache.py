"""Kernels that TensorRT-RTX compiled on this GPU, kept between processes: compiling takes seconds at every start.

They lie in the user's cache folder (``$XDG_CACHE_HOME``, or ``~/.cache``) under ``l4convert/kernels``, a file for each
plan and GPU. TensorRT-RTX itself refuses a file of another version, driver or GPU; whatever goes wrong with one only
means that the kernels are compiled again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self


def cache_folder() -> Path:
    """Where they are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "l4convert" / "kernels"


class KernelCache:
    """The compiled kernels of one plan on one GPU.

    Args:
        file: Where they are kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._cache: Any = None
        self._kept = b""

    @classmethod
    def of(cls, plan: Path, gpu: str) -> Self:
        """That of a plan file on a GPU of this name."""
        key = hashlib.sha256(f"{plan.resolve()}\n{gpu}".encode()).hexdigest()
        return cls(cache_folder() / f"{key[:32]}.bin")

    def attach(self, config: Any) -> None:
        """Let an ``IRuntimeConfig`` of the plan use it; all of them share one."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._kept = self.file.read_bytes()
            if self._kept and not self._cache.deserialize(self._kept):
                self._kept = b""
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what was compiled, where that is more than what was there; whole or not at all."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        if content == self._kept:
            return
        partial = self.file.with_suffix(f".{os.getpid()}.partial")
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(self.file)
