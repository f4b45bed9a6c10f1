"""Fuzz targets in forks of one process, which instruments the parsers once: ``python -m tests.fuzz.one``.

Reads requests, lines of JSON ``{"target": name, "options": [libFuzzer's], "log": file}``, and answers each with its
exit code when that child has ended. Requests are worked on in the order in which they come, ``--jobs`` at a time.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from typing import Any

import atheris  # type: ignore[import-untyped]  # publishes no types

PARSERS = [
    "l4convert.checkpoint", "l4convert.emit", "l4convert.runtime", "l4convert.quantization.recipe",
    "l4convert.quantization.kv", "l4convert.parity.policy", "l4convert.targets.hardware", "l4convert.cli._config",
    "l4convert.onnx_in",
]  # fmt: skip

with atheris.instrument_imports(include=PARSERS, enable_loader_override=False):
    from tests.fuzz.mutate import mutate_json
    from tests.fuzz.target import check
    from tests.fuzz.targets import TARGETS


def mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutation exists only once a run has begun, so it is looked up here."""
    return mutate_json(atheris.Mutate, data, max_size, seed)


def fuzz(request: dict[str, Any]) -> None:
    """In a child: never returns."""
    target = TARGETS[request["target"]]
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    keywords = {} if target.form == "bytes" else {"custom_mutator": mutator}
    atheris.Setup([sys.argv[0], *request["options"]], functools.partial(check, target.parse), **keywords)
    atheris.Fuzz()


def main() -> None:
    jobs = int(sys.argv[1])
    running: dict[int, str] = {}
    requests = [json.loads(line) for line in sys.stdin]
    while requests or running:
        while requests and len(running) < jobs:
            request = requests.pop(0)
            pid = os.fork()
            if not pid:
                try:
                    fuzz(request)
                except BaseException:  # of a mutation; libFuzzer ends the process by itself
                    traceback.print_exc()
                finally:
                    os._exit(70)
            running[pid] = request["target"]
        pid, status = os.wait()
        print(json.dumps([running.pop(pid), os.waitstatus_to_exitcode(status)]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
