"""A warm process: imports the command line once, then forks for each run, so that a run costs milliseconds.

Requests and replies are lines of JSON on stdin and stdout. A run happens in a child, under an audit hook
(https://docs.python.org/3/library/audit_events.html) that notes whatever a hostile file could make it do. Peak memory
is the child's own: the kernel starts a new process's VmHWM at the memory that it begins with (kernel/fork.c, dup_mm).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KILL_SECONDS = 20.0
# Whatever goes wrong, the machine must survive it.
EXTRA_BYTES = 4 << 30
# What the commands import when they run; a module that one version lacks is left out.
PRELOAD = (
    "l4convert.cli.convert", "l4convert.cli.inspect", "l4convert.cli.plan", "l4convert.cli.verify",
    "l4convert.pipeline", "l4convert.cli._plan", "l4convert.cli._inspect_checkpoint",
    "l4convert.cli._inspect_artifact", "l4convert.emit",
    "l4convert.cli.optimize", "l4convert.optimizing", "l4convert.checkpoint.meta", "l4convert.checkpoint.adapters",
    "tokenizers",
)  # fmt: skip

# Events that no refused file may cause.
FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "subprocess.Popen",
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class",
    "ctypes.dlopen", "webbrowser.open", "urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect",
    "imaplib.open", "code.__new__", "cpython.run_command", "cpython.run_file", "builtins.input", "sys.settrace",
    "os.kill", "os.putenv", "os.setxattr", "os.chown",
)  # fmt: skip
CHANGES = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime",
    "shutil.rmtree", "shutil.copyfile", "shutil.move",
)  # fmt: skip


def memory_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Auditor:
    """Notes forbidden events, and files that are written outside of ``room`` or read in ``room/outside``."""

    def __init__(self, room: str) -> None:
        self.room, self.secret = room + os.sep, os.path.join(room, "outside")  # noqa: PTH118
        self.found: list[str] = []
        self.watching = True

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event}{str(args)[:80]}")
        elif event in {"open", *CHANGES}:
            self.watching = False  # realpath has events of its own
            try:
                self.found += list(self._file(event, args))
            finally:
                self.watching = True

    def _file(self, event: str, args: tuple[Any, ...]) -> Iterator[str]:
        path = args[0] if args else None
        if not isinstance(path, str | bytes | os.PathLike):
            return
        real = os.path.realpath(os.fsdecode(path))
        if real.startswith(self.secret):
            yield f"{event} {real}"
        flags = args[2] if event == "open" and len(args) > 2 and isinstance(args[2], int) else os.O_RDONLY
        changes = event != "open" or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if changes and not real.startswith(self.room) and real != os.devnull:
            yield f"{event} for writing {real}"


def child(request: dict[str, Any], reply: int) -> None:
    """Run one command line and write what it took; never returns."""
    room = request["room"]
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(room, name), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)  # noqa: PTH118
    os.chdir(os.path.join(room, "work"))  # noqa: PTH118
    from l4convert.cli import run

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES,) * 2)
    auditor = Auditor(room)
    start_bytes = memory_bytes("VmRSS")
    sys.addaudithook(auditor)
    start = time.monotonic()
    code = run(request["argv"])
    seconds = time.monotonic() - start
    auditor.watching = False
    sys.stdout.flush()
    sys.stderr.flush()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    outcome = {
        "code": code,
        "wall": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": memory_bytes("VmHWM") - start_bytes,
        "events": auditor.found[:20],
    }
    os.write(reply, json.dumps(outcome).encode())
    os._exit(0)


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run ``request`` in a child; one that dies or does not end is reported as such."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reading)
            child(request, writing)
        finally:
            os._exit(70)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], KILL_SECONDS)
    data = b"".join(iter(lambda: os.read(reading, 65536), b"")) if ready else b""
    os.close(reading)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if data:
        outcome: dict[str, Any] = json.loads(data)
        return outcome
    died = f"did not end in {KILL_SECONDS:g} s" if not ready else f"died: {os.waitstatus_to_exitcode(status)}"
    return {"code": None, "wall": KILL_SECONDS, "cpu": KILL_SECONDS, "memory": 0, "events": [died]}


def main() -> None:
    for name in PRELOAD:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    gc.collect()
    gc.freeze()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
