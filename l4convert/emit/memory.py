"""How much memory filling may take: the user's limit, and how it is shared out."""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from l4convert.errors import UsageError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_PAGES_BYTES = 512 << 20  # three of Llama 4's gate_up matrices, so that the next one does not wait for the last
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryShare:
    """Bytes for running jobs together, and for mapped pages of the checkpoint."""

    jobs: int
    pages: int


def parse_size(text: str) -> int:
    """``"4G"``, ``"512M"``, ``"1.5 GiB"`` or plain bytes, in powers of 1024, as memory is sold.

    Raises:
        UsageError: It is no such size, zero, or more than any machine has.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0
    if not 1 <= size < 1 << 63:
        raise UsageError(f"{text!r} is not an amount of memory", "write it as 4G or 512M")
    return int(size)


def default_limit() -> int:
    """A quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


def share_memory(limit: int, largest_job: int, processes: int = 1) -> MemoryShare:
    """Divide what ``limit``, shared by so many ``processes``, leaves after what this one holds already.

    Raises:
        UsageError: The largest job does not fit; names the least limit.
    """
    held = resident_bytes()
    left = limit // processes - held
    pages = min(_MAX_PAGES_BYTES, max(left, 0) // 4)
    if left - pages < largest_job:
        least = -(-(held + largest_job * 4 // 3 + 8 * _MIB) // _MIB) * processes
        raise UsageError(
            f"a memory limit of {limit // _MIB}M is too small for this model: the least is {least}M",
            hint=f"pass --memory-limit {least}M or more",
        )
    return MemoryShare(left - pages, pages)


def resident_bytes() -> int:
    """This process's resident set, in bytes; its highest so far where the system only tells that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _highest_bytes()


def peak_resident_bytes() -> int:
    """The most bytes this process ever had in memory since its program began, mapped files included.

    Not ``ru_maxrss`` where it can be avoided: that counts what the process was before, a copy of its parent.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        rows = dict(line.split(":", 1) for line in status.read_text(encoding="ascii", errors="replace").splitlines())
        if "VmHWM" in rows:
            return int(rows["VmHWM"].split()[0]) * 1024
    return _highest_bytes()


def _highest_bytes() -> int:
    """``ru_maxrss``, which every Unix has, in one unit."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """Memory that this process may still take: what the system can free, within the control group's limit.

    None where the system does not say.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    rows = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    if "MemAvailable" not in rows:
        return None
    available = int(rows["MemAvailable"].split()[0]) * 1024
    room = _control_group_room(Path("/sys/fs/cgroup"))
    return available if room is None else min(available, room)


def _control_group_room(group: Path) -> int | None:
    """What a container's limit (cgroup v2) leaves; cached file pages do not count, they make room by themselves."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        rows = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(int(limit) - int(rows["anon"]), 0) if limit.isdigit() else None
    except (OSError, ValueError, KeyError):
        return None
