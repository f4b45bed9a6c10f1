"""Experts in Meta's files: stacked along the first axis, in two axes or three, perhaps quantized.

Meta's own quantization (``llama_models/llama4/scripts/quantize.py``, ``quantize_impls.py``) keeps the weights under
their keys and puts scales into files beside them, under the names that its modules have:

- ``fp8_scales_N.pt``: weights [E K, N] are E4M3, scales [E, N] float32, one for each output of an expert.
- ``int4_scales_N.pt``: two weights that follow each other along K lie in one byte, the first in its low nibble, so
  the stored tensor is [E K/2, N]; it says that it is E4M3, which it is not. Scales [E, K/128, N] float32.

A file's share of ``w2`` is a range of K, so its FP8 scales are of that range only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.meta_shards import Shards, check_float
from l4convert.checkpoint.prequantized import Prequantized, carried
from l4convert.checkpoint.pth_file import DOWNLOAD_HINT, open_together
from l4convert.checkpoint.remote import names_in
from l4convert.checkpoint.safetensors_file import Stored
from l4convert.checkpoint.text import and_more, show
from l4convert.errors import InputError

Kind = Literal["fp8", "int4"]
#: Name of a weight in Meta's modules -> its key in published files (``Experts.load_hook`` of moe.py).
KEYS: Mapping[str, str] = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}
KINDS: tuple[Kind, ...] = ("fp8", "int4")
_SCALE = re.compile(r"layers\.\d{1,5}\.feed_forward\.experts\.w[123]", re.ASCII)


@dataclass(frozen=True)
class ExpertScales:
    """The scales of quantized experts.

    Attributes:
        kind: How the experts are stored.
        files: One a rank.
        tensors: Of each file, by the names of Meta's modules: ``layers.1.feed_forward.experts.w1``.
    """

    kind: Kind
    files: tuple[Path, ...]
    tensors: tuple[Mapping[str, LazyTensor], ...]


def open_scales(path: Path, ranks: int) -> ExpertScales | None:
    """Open the files with scales of a folder; None where it has none.

    Raises:
        InputError: One is missing, or there are both kinds, as :func:`open_together`; or they hold something else.
    """
    names = [file.name for file in names_in(path, ".pt")]
    found = {kind: [name for name in names if name.startswith(f"{kind}_scales_")] for kind in KINDS}
    kinds = [kind for kind in KINDS if found[kind]]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise InputError(f"{show(path)}: has both fp8_scales and int4_scales files", "keep those that the weights need")
    kind = kinds[0]
    expected = [f"{kind}_scales_{rank}.pt" for rank in range(ranks)]
    wrong = sorted({*expected} ^ {*found[kind]})
    if wrong:
        fault = "is missing" if wrong[0] in expected else f"has no consolidated file: there are {ranks}"
        raise InputError(f"{show(path / wrong[0])}: {fault}{and_more(len(wrong) - 1)}", DOWNLOAD_HINT)
    files = open_together([path / name for name in expected])
    for file in files:
        others = [*file.others, *(key for key in file.tensors if not _SCALE.fullmatch(key))]
        if others or file.tensors.keys() != files[0].tensors.keys():
            key = next(iter(others), None) or min(file.tensors.keys() ^ files[0].tensors.keys())
            raise InputError(f"{show(file.path)}: '{show(key)}' is no scale of experts that every file has")
    return ExpertScales(kind, tuple(file.path for file in files), tuple(file.tensors for file in files))


def expert_parts(
    shards: Shards, prefix: str, name: str, shape: tuple[int, int, int], scales: ExpertScales | None
) -> list[LazyTensor]:
    """Every file's share of one projection of all experts, [E, K, N].

    Args:
        shards: The files.
        prefix: Of the experts' keys.
        name: ``w1``, ``w2`` or ``w3``.
        shape: Of a share.
        scales: Where experts may be quantized.

    Raises:
        InputError: A tensor is missing, or of another shape or type.
    """
    published = prefix + KEYS[name]
    key = published if published in shards or prefix + name not in shards else prefix + name
    parts = shards.parts(key)
    where = shards.where(key)
    if scales is None or prefix + name not in scales.tensors[0]:
        return [check_float(_three_axes(part, shape, where), where) for part in parts]
    read = _fp8 if scales.kind == "fp8" else _int4
    quantized = []
    for part, of_rank, file in zip(parts, scales.tensors, scales.files, strict=True):
        if part.dtype != ir.DataType.FLOAT8E4M3FN:
            raise InputError(f"{where} is {part.dtype.name}, though {show(file.name)} has scales for it", DOWNLOAD_HINT)
        quantized.append(read(part, of_rank[prefix + name], shape, where))
    return quantized


def as_one(joined: LazyTensor) -> LazyTensor:
    """Shares [E, K, N] that were joined, as one weight where they are quantized, so that it knows its own groups."""
    found = carried(transposed(joined))
    return joined if found is None else transposed(Prequantized(found.values, found.scales, found.block_size))


def _fp8(part: LazyTensor, scales: LazyTensor, shape: tuple[int, int, int], where: str) -> LazyTensor:
    experts, depth, width = shape
    rows = _scales(scales, (experts, width), (experts, width, 1))
    return transposed(Prequantized(transposed(_three_axes(part, shape, where)), rows, depth))


def _int4(part: LazyTensor, scales: LazyTensor, shape: tuple[int, int, int], where: str) -> LazyTensor:
    experts, depth, width = shape
    groups = scales.dims[1] if len(scales.dims) == 3 else 0
    if depth % 2 or groups < 1 or depth % groups:
        raise InputError(f"{scales.origin} has shape {list(scales.dims)}, which does not divide {depth} rows evenly")
    pairs = _three_axes(part, (experts, depth // 2, width), where)
    along = transposed(_scales(scales, (experts, groups, width), (experts, groups, width)))
    return transposed(Prequantized(transposed(RowPairs(pairs)), along, depth // groups))


def _scales(tensor: LazyTensor, shape: Sequence[int], seen_as: tuple[int, ...]) -> LazyTensor:
    if tensor.dims != tuple(shape) or tensor.dtype != ir.DataType.FLOAT or not isinstance(tensor, Stored):
        what = f"is {tensor.dtype.name} {list(tensor.dims)}, expected FLOAT {list(shape)}, contiguous"
        raise InputError(f"{tensor.origin} {what}", DOWNLOAD_HINT)
    return tensor.viewed(seen_as)


def _three_axes(part: LazyTensor, shape: tuple[int, int, int], where: str) -> LazyTensor:
    """A stack [E, K, N], or one that is stored as [E K, N]."""
    if part.dims == shape:
        return part
    experts, rows, width = shape
    if part.dims == (experts * rows, width):
        if isinstance(part, Stored):
            return part.viewed(shape)
        raise InputError(f"{where} is a transposed view of experts in two axes", "save it again after .contiguous()")
    expected = f"{[experts * rows, width]} or {list(shape)}"
    raise InputError(f"{where} has shape {list(part.dims)}, params.json makes it {expected} in each file")


class RowPairs(Derived):
    """Bytes [..., K/2, N] that hold two rows each, as INT4 [..., K, N]: the even row in the low nibble."""

    def __init__(self, part: LazyTensor) -> None:
        *lead, rows, cols = part.dims
        super().__init__([part], ir.DataType.INT4, [*lead, 2 * rows, cols])

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        first = rows.start // 2
        stored = self.parts[0].tile(batch, slice(first, -(-rows.stop // 2)), cols).view(np.int8)
        both = np.empty((len(stored), 2, stored.shape[1]), np.int8)
        np.right_shift(np.left_shift(stored, 4), 4, out=both[:, 0])  # shifting back fills in the sign
        np.right_shift(stored, 4, out=both[:, 1])
        values: np.ndarray = both.reshape(-1, stored.shape[1]).view(ml_dtypes.int4)
        return values[rows.start - 2 * first : rows.stop - 2 * first]
