"""What the runner of engines needs of a GPU: two small interfaces, so that all else is tested without one.

:mod:`l4convert.runtime.cuda` implements them with cuda-python and TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]


class Graph(Protocol):
    """Work that was recorded, and can be started again as a whole."""

    def launch(self) -> None:
        """Start it on the device's stream."""
        ...

    def free(self) -> None:
        """Forget it."""
        ...


class Plan(Protocol):
    """An engine that is loaded, with one execution context for each of its optimization profiles."""

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a call needs at most; calls of other plans on the same stream may use the same."""
        ...

    def use_scratch(self, address: int, nbytes: int) -> None:
        """Give it that memory, before the first call."""
        ...

    def bind(self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]) -> None:
        """Say what the next calls with a profile are on.

        Args:
            profile: Index of the optimization profile.
            shapes: Of every input.
            addresses: Of every input and output, in device memory.
        """
        ...

    def enqueue(self, profile: int) -> None:
        """Start one call on the device's stream, and return at once."""
        ...

    def replayed(self, profile: int) -> bool:
        """Whether the runtime itself replays calls with a profile as a CUDA graph."""
        ...

    def close(self) -> None:
        """Unload it, once the device is done with it."""
        ...


class Device(Protocol):
    """One GPU and one stream on it: everything below happens in order."""

    @property
    def name(self) -> str:
        """What its maker calls it."""
        ...

    @property
    def compute_capability(self) -> str:
        """As "8.9"."""
        ...

    def free_bytes(self) -> int:
        """Device memory that is free now."""
        ...

    def alloc(self, nbytes: int) -> int:
        """Address of fresh device memory."""
        ...

    def free(self, address: int) -> None:
        """Give it back."""
        ...

    def zero(self, address: int, nbytes: int) -> None:
        """Fill with zero bytes."""
        ...

    def copy_in(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy an array, in C order, to the device; the array may be changed once this returns."""
        ...

    def copy_out(self, address: int, shape: Shape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Wait for everything before, and copy from the device."""
        ...

    def load(self, file: Path, *, replay: frozenset[int] = frozenset()) -> Plan:
        """Load an engine; ``replay``: profiles that the runtime should replay as CUDA graphs, where it can."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """Record what ``work`` puts on the stream, without running it; None where it cannot be recorded."""
        ...

    def wait(self) -> None:
        """Until everything before is done."""
        ...

    def close(self) -> None:
        """Wait for everything, and give the stream back."""
        ...
