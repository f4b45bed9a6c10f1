"""Fill the weights file: every tensor at its planned offset, digested in file order by a thread that follows.

Where a tensor's bytes go depends on the plan alone, so tensors may be written in any order. The follower reads them
back (from the page cache, where they just were), hence what it digests is what the file holds.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor
from l4convert.emit.digest import RegionDigest
from l4convert.emit.plan import PlannedTensor, WeightsPlan, group_chunks
from l4convert.emit.staging import os_error, reported
from l4convert.errors import InputError
from l4convert.progress import NO_PROGRESS, Progress, Task

# Storage type of each float type, and the smallest bit pattern, sign cleared, that is NaN or infinite: that with all
# exponent bits set (IEEE 754, and "OCP 8-bit Floating Point Specification" for E5M2). E4M3FN has no infinity, one NaN.
_NOT_FINITE: dict[ir.DataType, tuple[str, int]] = {
    ir.DataType.FLOAT: ("<u4", 0x7F80_0000),
    ir.DataType.DOUBLE: ("<u8", 0x7FF0_0000_0000_0000),
    ir.DataType.FLOAT16: ("<u2", 0x7C00),
    ir.DataType.BFLOAT16: ("<u2", 0x7F80),
    ir.DataType.FLOAT8E4M3FN: ("u1", 0x7F),
    ir.DataType.FLOAT8E5M2: ("u1", 0x7C),
}
# Looked at together, so that temporaries stay in a core's cache.
_CACHED_ELEMENTS = 1 << 16


def write_weights(
    path: Path, plan: WeightsPlan, progress: Progress = NO_PROGRESS
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write a new weights file as planned, in bounded memory.

    Returns:
        Its entry in the manifest, and the entries of its tensors by name.

    Raises:
        InputError: The disk is full or fails, a source cannot be read, or a weight is NaN or infinite.
    """
    with reported(f"{path.name}: cannot be created"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    follower = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
    digest = RegionDigest(descriptor)
    pending: dict[str, Future[str]] = {}
    try:
        with progress.task("Writing weights", total=plan.written_bytes, unit="B") as task:
            with reported(f"{path.name}: cannot be written"):
                os.ftruncate(descriptor, plan.total_bytes)  # the gaps between tensors read as zeros
            file = _File(path, descriptor, plan.written_bytes, task)
            file.write(0, plan.header, "header")
            for group in plan.groups:
                _fill(file, group)
                for planned in group:
                    stop = planned.offset + planned.nbytes
                    pending[planned.name] = follower.submit(digest.region, planned.offset, stop)
            with reported(f"{path.name}: cannot be read back"):
                tensors = {t.name: _entry(t, pending[t.name].result()) for t in plan.tensors}
                whole = follower.submit(digest.whole, plan.total_bytes).result()
    finally:
        follower.shutdown(cancel_futures=True)
        os.close(descriptor)
    return {"bytes": plan.total_bytes, "sha256": whole}, tensors


def check_finite(tensor: ir.TensorProtocol) -> None:
    """Refuse a small weight from a checkpoint that is not finite; constants of the graph itself may be infinite.

    Raises:
        InputError: Names the tensor and how many of its values are NaN or infinite.
    """
    if _is_weight(tensor):
        _raise_unless_finite(tensor, count_not_finite(tensor.tobytes(), tensor.dtype))


def count_not_finite(data: bytes, dtype: ir.DataType) -> int:
    """How many values among little-endian ``data`` are NaN or infinite; 0 for types that have neither."""
    if dtype not in _NOT_FINITE:
        return 0
    storage, smallest = _NOT_FINITE[dtype]
    bits = np.frombuffer(data, storage)
    magnitude = np.iinfo(bits.dtype).max >> 1
    count = 0
    for start in range(0, bits.size, _CACHED_ELEMENTS):
        block = bits[start : start + _CACHED_ELEMENTS] & magnitude
        if block.max() >= smallest:
            count += int(np.count_nonzero(block >= smallest))
    return count


class _File:
    """The file being filled: writes at offsets, and knows how much is still to come."""

    def __init__(self, path: Path, descriptor: int, total: int, task: Task) -> None:
        self._path = path
        self._descriptor = descriptor
        self._remaining = total
        self._task = task

    def write(self, offset: int, data: bytes, what: str) -> None:
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                offset += written
                self._remaining -= written
                view = view[written:]
        except OSError as error:
            raise self._error(what, error) from error
        self._task.advance(len(data))

    def _error(self, what: str, error: OSError) -> InputError:
        label = f"{self._path.name}: {what}"
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return os_error(f"{label}: cannot be written", error)
        free = shutil.disk_usage(self._path.parent).free
        return os_error(f"{label}: {self._remaining} bytes are still to be written, {free} are free", error)


def _fill(file: _File, group: Sequence[PlannedTensor]) -> None:
    written = dict.fromkeys((planned.name for planned in group), 0)
    not_finite = dict(written)
    for planned, offset, data in _computed(group):
        if offset != written[planned.name] or offset + len(data) > planned.nbytes:
            raise RuntimeError(f"{planned.name}: computed bytes do not follow each other at {offset}")
        if _is_weight(planned.tensor):
            not_finite[planned.name] += count_not_finite(data, planned.tensor.dtype)
        file.write(planned.offset + offset, data, f"tensor {planned.name!r}")
        written[planned.name] += len(data)
    for planned in group:
        if written[planned.name] != planned.nbytes:
            raise RuntimeError(f"{planned.name}: computed {written[planned.name]} of {planned.nbytes} bytes")
        _raise_unless_finite(planned.tensor, not_finite[planned.name])


def _computed(group: Sequence[PlannedTensor]) -> Iterator[tuple[PlannedTensor, int, bytes]]:
    with reported(f"tensor {group[0].name!r}: its source cannot be read"):
        yield from group_chunks(group)


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, LazyTensor) and bool(tensor.sources)


def _raise_unless_finite(tensor: ir.TensorProtocol, count: int) -> None:
    if count and isinstance(tensor, LazyTensor):
        raise InputError(
            f"tensor {tensor.sources[0]!r}: {count} of the {tensor.size} values written from it are NaN or infinite",
            hint="the checkpoint is damaged or was trained into overflow; no conversion of it can be right",
        )


def _entry(planned: PlannedTensor, sha256: str) -> dict[str, Any]:
    dtype = planned.tensor.dtype.name
    return {"dtype": dtype, "shape": list(planned.shape), "nbytes": planned.nbytes, "sha256": sha256}
