"""Environments of their own for the public clients: their pins and ours exclude each other."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent

Request = dict[str, Any]
Answer = dict[str, Any]


def run_client(name: str, request: Request, *, timeout: float = 300) -> Answer:
    """Run ``client_{name}.py`` in the client's environment: JSON in on stdin, JSON out on stdout.

    Raises:
        AssertionError: The client failed; the message ends with what it said.
    """
    command = [str(client_python(name)), str(HERE / f"client_{name}.py")]
    done = subprocess.run(
        command,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # an artifact is all that a client may need
    )
    assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    answer: Answer = json.loads(done.stdout)
    return answer


def client_python(name: str) -> Path:
    """The interpreter of ``.venv-{name}``, which is made from ``requirements-{name}.txt`` when that has changed."""
    folder, requirements = REPO / f".venv-{name}", HERE / f"requirements-{name}.txt"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = f"{sys.version}\n{requirements.read_text()}"
    with requirements.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test runs beside each other make it once
        if not stamp.is_file() or stamp.read_text() != wanted:
            venv.create(folder, clear=True, with_pip=True)
            (folder / ".gitignore").write_text("*\n")
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*install, "-r", str(requirements)], check=True)
            stamp.write_text(wanted)
    return python
