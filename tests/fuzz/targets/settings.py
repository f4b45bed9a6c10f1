"""Files that a user writes or is given: recipes, policies, hardware profiles, the tool's own settings. All are TOML."""

from __future__ import annotations

from importlib import resources

import click

from l4convert.cli import cli
from l4convert.cli._config import load_config
from l4convert.parity.policy import load_policy
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.recipe import load_recipe
from l4convert.targets.hardware import load_hardware
from tests.fuzz.target import OneFile, Target

_recipe, _policy, _hardware, _settings = (OneFile(f"{name}.toml") for name in ("recipe", "policy", "hardware", "own"))
_SCHEME = KvScheme("int8")


def bundled(package: str, folder: str) -> list[bytes]:
    """The files of a kind that come with the tool."""
    found = resources.files(package).joinpath(folder).iterdir()
    return [entry.read_bytes() for entry in found if entry.name.endswith(".toml")]


def parse_settings(data: bytes) -> None:
    context = click.Context(cli)
    load_config(_settings(data), cli, context)


RECIPE = Target(
    lambda data: load_recipe(str(_recipe(data))),
    lambda: [
        *bundled("l4convert.quantization", "recipes"),
        b'[[rule]]\npattern = "*.weight"\nscheme = "int4"\nblock_size = 64\n\n[kv_cache]\ndtype = "int8"\n',
    ],
    ("[[rule]]", "pattern", "scheme", '"int4"', "block_size", "[kv_cache]", "dtype", "granularity", "0x", "1e400"),
)
POLICY = Target(
    lambda data: load_policy(_policy(data), "cpu", "float32", _SCHEME),
    lambda: bundled("l4convert.parity", "policies"),
    ("schema", "[reference]", "[drift]", "[target.cpu.drift]", "[kv.int8.drift]", "nan", "inf", "0x", "1e400"),
)
HARDWARE = Target(
    lambda data: load_hardware(str(_hardware(data))),
    lambda: bundled("l4convert.targets", "profiles"),
    ("summary", "runtimes", "precisions", "memory_bytes", "peak_flops", "sources", "0x"),
)
SETTINGS = Target(
    parse_settings,
    lambda: [
        b'quiet = true\n[convert]\nrecipe = "fp8"\n[plugins.build]\njobs = 1\n',
        b"[generate]\nmax-new-tokens = 3\n",
    ],
    ("[convert]", "[plugins.build]", "recipe", "quiet", "max-new-tokens", "[[", "0x"),
)
