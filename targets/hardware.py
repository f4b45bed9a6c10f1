"""Hardware profiles: what a GPU is and can do, read from ``targets/profiles/NAME.toml`` or a user's own file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError, UsageError
from l4convert.toml_file import parse_toml, toml_bytes

#: Formats that a graph's numbers may have. INT8, INT4 and FP4 mean weights in that format.
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "fp4")
#: What runs engines: names of conversion targets.
RUNTIMES = ("tensorrt-rtx", "tensorrt")

_KEYS = frozenset({
    "summary", "compute_capability", "memory_bytes", "bandwidth_bytes_per_second", "precisions", "runtimes", "recipe",
    "peak_flops", "sources", "unified_memory",
})  # fmt: skip
_MAX_FIGURE = 1 << 63


@dataclass(frozen=True)
class Hardware:
    """One profile.

    Attributes:
        name: Of the bundled file, or the stem of the user's own; names the folder of engines.
        summary: One line for people.
        compute_capability: CUDA's "major.minor"; None where no engine runtime targets it.
        memory_bytes: Memory of one GPU as sold, in powers of 1000; None where it differs from machine to machine.
        bandwidth_bytes_per_second: Of that memory, at its peak.
        precisions: Of :data:`PRECISIONS`, those that it can compute with or read weights in.
        runtimes: Of :data:`RUNTIMES`, those that have engines for it.
        recipe: Name of the quantization recipe to start with.
        peak_flops: Precision -> multiplications and additions a second in dense matrix products; what is unknown is
            left out.
        unified_memory: The CPU and its programs use the same memory.
        sources: Field -> where its figure was taken from.
    """

    name: str
    summary: str
    compute_capability: str | None
    memory_bytes: int | None
    bandwidth_bytes_per_second: int | None
    precisions: tuple[str, ...]
    runtimes: tuple[str, ...]
    recipe: str
    peak_flops: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    unified_memory: bool = False

    @property
    def sm(self) -> int:
        """Compute capability as one number: 89 for 8.9, 120 for 12.0; 0 where there is none."""
        return int(self.compute_capability.replace(".", "")) if self.compute_capability else 0

    def as_dict(self) -> dict[str, Any]:
        """JSON fields, all of them."""
        return {
            "name": self.name,
            "summary": self.summary,
            "compute_capability": self.compute_capability,
            "memory_bytes": self.memory_bytes,
            "bandwidth_bytes_per_second": self.bandwidth_bytes_per_second,
            "precisions": list(self.precisions),
            "runtimes": list(self.runtimes),
            "recipe": self.recipe,
            "unified_memory": self.unified_memory,
            "peak_flops": dict(self.peak_flops),
            "sources": dict(self.sources),
        }


def hardware_names() -> tuple[str, ...]:
    """Names of the bundled profiles, sorted."""
    return tuple(sorted(item.name.removesuffix(".toml") for item in _bundle().iterdir() if item.name.endswith(".toml")))


def load_hardware(name_or_path: str) -> Hardware:
    """Read a bundled profile by its name, or a file (a path that ends in ``.toml`` or has a folder in it).

    Raises:
        UsageError: No bundled profile has this name.
        InputError: The file cannot be read or is no profile; the message names the file and the key.
    """
    if name_or_path.endswith(".toml") or Path(name_or_path).name != name_or_path:
        path = Path(name_or_path)
        return parse_hardware(toml_bytes(path), path.stem, str(path))
    if name_or_path not in hardware_names():
        names = ", ".join(hardware_names())
        raise UsageError(f"{show(name_or_path)} is not a hardware profile", f"profiles: {names}, or your own FILE.toml")
    text = _bundle().joinpath(f"{name_or_path}.toml").read_text(encoding="utf-8")
    return parse_hardware(text, name_or_path, f"{name_or_path}.toml")


def parse_hardware(text: bytes | str, name: str, where: str) -> Hardware:
    """Check a profile's text and build it.

    Args:
        text: TOML.
        name: What the profile is called.
        where: The file, as messages name it.

    Raises:
        InputError: Not TOML, unknown or missing keys, wrong types or values.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InputError(f"{where}: its name is no name of a folder", "use letters, digits, dots and hyphens")
    return _Profile(parse_toml(text, where), where).hardware(name)


@dataclass(frozen=True)
class _Profile:
    """The parsed keys of one file; every failure names the file and the key."""

    data: Mapping[str, Any]
    where: str

    def hardware(self, name: str) -> Hardware:
        for key in self.data:
            if key not in _KEYS:
                self.fail(key, "is not a key of a profile", f"keys: {', '.join(sorted(_KEYS))}")
        runtimes = self.words("runtimes", RUNTIMES)
        gpu = bool(runtimes) or "compute_capability" in self.data
        precisions = self.words("precisions", PRECISIONS)
        if not precisions:
            self.fail("precisions", "is empty")
        return Hardware(
            name=name,
            summary=self.text("summary"),
            compute_capability=self.capability() if gpu else None,
            memory_bytes=self.figure("memory_bytes") if gpu else None,
            bandwidth_bytes_per_second=self.figure("bandwidth_bytes_per_second") if gpu else None,
            precisions=precisions,
            runtimes=runtimes,
            recipe=self.text("recipe"),
            peak_flops=MappingProxyType(self.rates(precisions)),
            sources=MappingProxyType(self.sources()),
            unified_memory=self.flag("unified_memory"),
        )

    def fail(self, key: str, problem: str, hint: str | None = None) -> NoReturn:
        raise InputError(f"{self.where}: {show(key)} {problem}", hint)

    def get(self, key: str) -> Any:
        if key not in self.data:
            self.fail(key, "is missing")
        return self.data[key]

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or not value or not value.isprintable():
            self.fail(key, f"must be one line of text, not {quote(value)}")
        return value

    def words(self, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
        value = self.get(key)
        if not isinstance(value, list) or any(word not in known for word in value) or len(set(value)) < len(value):
            self.fail(key, f"must be a list of some of {', '.join(known)}, not {quote(value)}")
        return tuple(value)

    def capability(self) -> str:
        value = self.get("compute_capability")
        if not isinstance(value, str) or not re.fullmatch(r"[1-9]\d?\.\d", value):
            self.fail("compute_capability", f'must be text like "8.9", not {quote(value)}')
        return value

    def figure(self, key: str) -> int:
        return self.positive(key, self.get(key))

    def positive(self, key: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < _MAX_FIGURE:
            self.fail(key, f"must be a whole number above 0, not {quote(value)}")
        return value

    def flag(self, key: str) -> bool:
        value = self.data.get(key, False)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {quote(value)}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self.data.get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"must be a table, not {quote(value)}")
        return value

    def rates(self, precisions: tuple[str, ...]) -> dict[str, int]:
        rates = self.table("peak_flops")
        for precision in rates:
            if precision not in precisions:
                self.fail("peak_flops", f"has {show(precision)}, which is not among its precisions")
        return {key: self.positive(f"peak_flops.{key}", value) for key, value in rates.items()}

    def sources(self) -> dict[str, str]:
        sources = self.table("sources")
        for key, value in sources.items():
            if key not in self.data or not isinstance(value, str):
                self.fail(f"sources.{key}", "must be the source, as text, of a key that the file has")
        return dict(sources)


def _bundle() -> Any:
    return resources.files("l4convert.targets").joinpath("profiles")
