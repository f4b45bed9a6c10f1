"""Fuzz one target in this process: ``python -m tests.fuzz.one NAME FOLDER [libFuzzer options]``."""

from __future__ import annotations

import functools
import sys

import atheris

with atheris.instrument_imports(include=["l4convert", "json", "tomllib", "zipfile"], enable_loader_override=False):
    from tests.fuzz.mutate import mutate_json
    from tests.fuzz.target import check
    from tests.fuzz.targets import TARGETS


def main() -> None:
    name, *options = sys.argv[1:]
    target = TARGETS[name]
    keywords = {} if target.form == "bytes" else {"custom_mutator": functools.partial(mutate_json, atheris.Mutate)}
    atheris.Setup([sys.argv[0], *options], functools.partial(check, target.parse), **keywords)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
