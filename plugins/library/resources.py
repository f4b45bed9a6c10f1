"""What a compiled kernel takes of a multiprocessor, and the committed table that keeps it from growing unnoticed.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; NVIDIA's tuning guides for the
shared memory of a multiprocessor. Registers are handed out by 256 a warp, and the system keeps 1 KiB of shared memory a
block.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from l4convert.errors import InputError
from l4convert.plugins.library.variants import RELATIVE, SHARED_LIMIT

TABLE = Path(__file__).with_name("resources.json")
# ptxas of another release may place a few registers differently; more than this is a change of the kernel.
REGISTER_TOLERANCE = 8
REGISTERS_OF_SM = 65536
REGISTER_UNIT = 256
RESERVED_SHARED = 1024
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor has: threads, blocks, and bytes of shared memory."""

    threads: int
    blocks: int
    shared: int


MULTIPROCESSOR = {
    80: Multiprocessor(2048, 32, 167936),
    86: Multiprocessor(1536, 16, 102400),
    89: Multiprocessor(1536, 24, 102400),
    90: Multiprocessor(2048, 32, 233472),
    100: Multiprocessor(2048, 32, 233472),
    120: Multiprocessor(1536, 24, 102400),
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one SM.

    Args:
        registers: Of a thread.
        spills: Bytes a thread keeps in local memory because registers did not suffice (stack and local).
        shared: Bytes of shared memory of a block.
        blocks: Blocks that fit a multiprocessor at once: its occupancy.
    """

    registers: int
    spills: int
    shared: int
    blocks: int


Table = dict[str, dict[str, Resources]]  # variant, SM as text


def read_resources(image: bytes, symbol: str, sm: int, shared: int, warps: int, tensor_memory: int = 0) -> Resources:
    """What ``cuobjdump`` (it comes with Triton) says of a cubin, beside what the compiler reported.

    Args:
        image: The cubin.
        symbol: The kernel in it.
        sm: What it was compiled for.
        shared: Bytes of shared memory that a launch asks for.
        warps: Warps of a block.
        tensor_memory: Columns of tensor memory of a block (SM 100).
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(_cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603
    match = re.search(rf"Function {re.escape(symbol)}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if match is None:
        raise InputError(f"cuobjdump does not show {symbol}: {' '.join(text.split())[:200]}")
    registers, stack, static, local = (int(number) for number in match.groups())
    # From SM 90 on the system's own part is written into the cubin.
    shared += max(0, static - RESERVED_SHARED) if sm >= 90 else static
    blocks = occupancy(sm, registers, shared, warps, tensor_memory)
    return Resources(registers, stack + local, shared, blocks)


def occupancy(sm: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Blocks that a multiprocessor of this SM can hold at once; 0 where even one does not fit.

    An SM that is not in the table counts as its relative.
    """
    limits = MULTIPROCESSOR.get(sm) or MULTIPROCESSOR[RELATIVE.get(sm, 80)]
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    bounds = [
        limits.blocks,
        limits.threads // (32 * warps),
        REGISTERS_OF_SM // (of_a_warp * warps),
        limits.shared // (shared + RESERVED_SHARED),
    ]
    if tensor_memory:
        bounds.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    return min(bounds)


def check_limits(resources: Resources, sm: int) -> str | None:
    """What the SM has not enough of, as one line; None where the kernel can be launched."""
    limit = SHARED_LIMIT.get(sm, max(SHARED_LIMIT.values()))
    if resources.shared > limit:
        return f"it needs {resources.shared} bytes of shared memory a block, and the SM has {limit}"
    if resources.blocks == 0:
        return f"not one block fits a multiprocessor ({resources.registers} registers a thread)"
    return None


def make_table(rows: Iterable[tuple[str, int, Resources]]) -> Table:
    """A table from rows of variant, SM and resources."""
    table: Table = {}
    for name, sm, resources in rows:
        table.setdefault(name, {})[str(sm)] = resources
    return table


def read_table(path: Path = TABLE) -> Table:
    """The committed table."""
    rows = json.loads(path.read_text())
    return {name: {sm: Resources(**row) for sm, row in by_sm.items()} for name, by_sm in rows.items()}


def write_table(table: Mapping[str, Mapping[str, Resources]], path: Path = TABLE) -> None:
    """Write the table in the form in which it is committed: sorted, a line an SM."""
    names = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f'  "{sm}": {json.dumps(asdict(by_sm[sm]))}' for sm in sorted(by_sm, key=int))
        + "\n}"
        for name, by_sm in sorted(table.items())
    ]
    path.write_text("{\n" + ",\n".join(names) + "\n}\n")


def regressions(fresh: Table, committed: Table, tolerance: int = REGISTER_TOLERANCE) -> list[str]:
    """What got worse, a line a finding: missing kernels, more spills or shared memory, many more registers."""
    found = []
    for name, sm, old in _rows(committed):
        new = fresh.get(name, {}).get(sm)
        if new is None:
            found.append(f"{name} for SM {sm} is not built any more")
            continue
        if new.registers > old.registers + tolerance:
            found.append(f"{name} for SM {sm}: {new.registers} registers, {old.registers} committed")
        if new.spills > old.spills:
            found.append(f"{name} for SM {sm}: {new.spills} bytes spilled, {old.spills} committed")
        if new.shared > old.shared:
            found.append(f"{name} for SM {sm}: {new.shared} bytes of shared memory, {old.shared} committed")
    found += [
        f"{name} for SM {sm} is not in the committed table"
        for name, sm, _ in _rows(fresh)
        if sm not in committed.get(name, {})
    ]
    return found


def _rows(table: Table) -> Iterable[tuple[str, str, Resources]]:
    return ((name, sm, row) for name, by_sm in table.items() for sm, row in by_sm.items())


def _cuobjdump() -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
