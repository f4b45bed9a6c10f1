"""Commands in processes of their own that start at once: forked from a process that has imported what they need.

Importing torch and transformers takes longer than most tests let a command run. A forked process has memory, standard
streams, folder, environment and exit code of its own; what an interpreter reads from the environment when it starts is
the server's, so tests of that start a process as a user does.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
# They may be forked, for they start no threads before they compute. onnxruntime does so when it is imported.
PRELOADED = (
    "torch",
    "transformers.models.llama4.modeling_llama4",
    "l4convert.pipeline",
    "l4convert.parity.validate",
    "l4convert.runtime.generate",
)


def run_command(args: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run ``l4convert args`` in that folder and environment, until it ends."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        streams = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (out, err)]
        code = _server().call({"args": list(args), "cwd": str(cwd), "env": dict(environment), "streams": streams})
        texts = [Path(f"/dev/fd/{stream.fileno()}").read_text() for stream in (out, err)]
    return subprocess.CompletedProcess(list(args), code, *texts)


class _Server:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, request: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@lru_cache(maxsize=1)
def _server() -> _Server:
    server = _Server()
    atexit.register(server.stop)
    return server


def _serve() -> dict[str, Any] | None:
    """Fork for every request, and write the exit code; returns the request in the process that is to do it."""
    for name in PRELOADED:
        import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    return None


def _become(request: Mapping[str, Any]) -> None:
    """Be the process that was asked for, to its end."""
    for number, name in enumerate((os.devnull, *request["streams"])):
        descriptor = os.open(name, os.O_RDWR)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["l4convert", *request["args"]]
    from l4convert.cli import main

    main()


if __name__ == "__main__":
    _request = _serve()
    if _request is not None:
        _become(_request)
