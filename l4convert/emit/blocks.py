"""Put the blocks of jobs into the weights file: computed, or where an earlier run wrote them, verified."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.finite import count_broken
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.pages import PageBudget
from l4convert.emit.digest import BLOCK_BYTES
from l4convert.emit.jobs import Job, Piece
from l4convert.emit.journal import new_digest
from l4convert.emit.staging import os_error, reported
from l4convert.errors import InputError

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
# No Llama 4 has weights of these types, but other people's ONNX models may: NumPy's own check, which is slower.
_RARE = {
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT8E8M0,
    ir.DataType.COMPLEX64,
    ir.DataType.COMPLEX128,
}
# Looked at together, so that temporaries stay in a core's cache.
_CACHED_ELEMENTS = 1 << 16


class NoRoomError(Exception):
    """The disk is full, or the user's share of it; only who knows all jobs can say how much is still to come.

    Args:
        what: What was being written, as an error names it.
        error: What the system said.
    """

    def __init__(self, what: str, error: OSError) -> None:
        super().__init__(what, error)
        self.what = what
        self.error = error


@dataclass(frozen=True, slots=True)
class Done:
    """A job whose bytes are in the file.

    Attributes:
        index: The job's.
        digest: :func:`~l4convert.emit.journal.new_digest` of its bytes.
        nbytes: How many they are.
        resumed: Whether they were there already.
    """

    index: int
    digest: bytes
    nbytes: int
    resumed: bool


class Blocks:
    """The open weights file of a plan; any number of threads, and of processes with their own, may work on it.

    Args:
        name: The file's, for errors.
        descriptor: Open for reading and writing; read and written at offsets, so its position does not matter.
        pages: What reading the checkpoint may keep mapped.
    """

    def __init__(self, name: str, descriptor: int, pages: PageBudget) -> None:
        self._name = name
        self._descriptor = descriptor
        self._pages = pages

    def do(self, job: Job, recorded: bytes | None) -> Done:
        """Write a job's bytes, unless they are there.

        Args:
            job: The job.
            recorded: Digest of what an earlier run wrote for it.

        Raises:
            InputError: A source or the file cannot be read or written, or a weight is NaN or infinite.
            NoRoomError: The disk is full.
        """
        if recorded is not None and self._holds(job, recorded):
            return Done(job.index, recorded, job.nbytes, resumed=True)
        digest = new_digest()
        for piece in job.pieces:
            name = piece.planned.name
            with reported(f"tensor {name!r}: its source cannot be read"), self._pages.job():
                data = piece.compute()
            if len(data) != piece.nbytes:
                raise RuntimeError(f"{name}: computed {len(data)} bytes, not {piece.nbytes}, for row {piece.start}")
            _check_piece(piece, data)
            digest.update(data)
            view = memoryview(data)
            for offset, nbytes in piece.places:
                write_at(self._descriptor, offset, view[:nbytes], f"{self._name}: tensor {name!r}")
                view = view[nbytes:]
        return Done(job.index, digest.digest(), job.nbytes, resumed=False)

    def _holds(self, job: Job, recorded: bytes) -> bool:
        """Whether the file holds what was recorded; a block that cannot be read is written again."""
        with contextlib.suppress(OSError):
            return self._digest(job.pieces) == recorded
        return False

    def _digest(self, pieces: tuple[Piece, ...]) -> bytes:
        """Digest of the pieces' bytes as the file holds them; empty where it ends before them."""
        digest = new_digest()
        buffer = memoryview(bytearray(BLOCK_BYTES))
        for offset, nbytes in (place for piece in pieces for place in piece.places):
            position, stop = offset, offset + nbytes
            while position < stop:
                count = os.preadv(self._descriptor, [buffer[: min(BLOCK_BYTES, stop - position)]], position)
                if not count:
                    return b""
                digest.update(buffer[:count])
                position += count
        return digest.digest()


def write_at(descriptor: int, offset: int, data: bytes | memoryview, what: str) -> None:
    """Write all of ``data``.

    Raises:
        InputError: The disk fails.
        NoRoomError: It is full.
    """
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            offset += written
            view = view[written:]
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise NoRoomError(what, error) from error
        raise os_error(f"{what}: cannot be written", error) from error


def check_finite(tensor: ir.TensorProtocol) -> None:
    """Refuse a small weight from a checkpoint that is not finite; constants of the graph itself may be infinite.

    Raises:
        InputError: Names the tensor and how many of its values are NaN or infinite.
    """
    if _is_weight(tensor):
        raise_unless_finite(tensor, count_not_finite(tensor.tobytes(), tensor.dtype, _infinite(tensor)), tensor.size)


def count_not_finite(data: bytes | memoryview, dtype: ir.DataType, infinite: bool = False) -> int:
    """How many values among little-endian ``data`` are NaN or, unless they may be, ``infinite``; 0 without either."""
    if dtype in _RARE:
        return count_broken(np.frombuffer(data, dtype.numpy()))
    if dtype not in _NOT_FINITE:
        return 0
    storage, smallest = _NOT_FINITE[dtype]
    smallest += infinite and dtype != ir.DataType.FLOAT8E4M3FN
    bits = np.frombuffer(data, storage)
    magnitude = np.iinfo(bits.dtype).max >> 1
    count = 0
    for start in range(0, bits.size, _CACHED_ELEMENTS):
        block = bits[start : start + _CACHED_ELEMENTS] & magnitude
        if block.max() >= smallest:
            count += int(np.count_nonzero(block >= smallest))
    return count


def _check_piece(piece: Piece, data: bytes | memoryview) -> None:
    tensor = piece.planned.tensor
    if _is_weight(tensor) and (count := count_not_finite(data, tensor.dtype, _infinite(tensor))):
        raise_unless_finite(tensor, count, len(data) * 8 // tensor.dtype.bitwidth)


def _is_weight(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, LazyTensor) and bool(tensor.sources)


def _infinite(tensor: ir.TensorProtocol) -> bool:
    return isinstance(tensor, LazyTensor) and tensor.may_be_infinite


def raise_unless_finite(tensor: ir.TensorProtocol, count: int, among: int) -> None:
    """Refuse a weight of which ``count`` values, of ``among`` that were looked at, are NaN or infinite.

    Raises:
        InputError: ``count`` is not 0; names the tensor.
    """
    if count and isinstance(tensor, LazyTensor):
        part = "" if among == tensor.size else " (in one block of it)"
        raise InputError(
            f"{tensor.origin}: {count} of the {among} values written from it{part} are NaN or infinite",
            hint="the checkpoint is damaged or was trained into overflow; no conversion of it can be right",
        )
