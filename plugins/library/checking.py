"""Running the conformance program on a library (conformance/main.cpp)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from l4convert.errors import InputError
from l4convert.plugins.library.build import CONFORMANCE
from l4convert.plugins.library.opening import require_whole


def check_library(library: Path) -> dict[str, Any]:
    """Drive every method of the library's TensorRT plugins, in a process of its own.

    Returns:
        ``failed``, how many checks failed, and ``checks``: subject, name, ok and what is wrong.

    Raises:
        InputError: There is no whole library, no program beside it, or the program did not come to its end.
    """
    require_whole(library)
    program = library.resolve().parent / CONFORMANCE
    if not os.access(program, os.X_OK):
        raise InputError(
            f"{program}: there is no such program",
            hint="l4convert plugins build puts it there, where it has TensorRT's headers: pip install kernel-lens",
        )
    command = [str(program), "--json", str(library.resolve())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    if done.returncode not in (0, 4):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{library}: the plugins could not be driven to the end: {last}")
    report = json.loads(done.stdout)
    return {"library": str(library), "failed": report["failed"], "checks": report["checks"]}
