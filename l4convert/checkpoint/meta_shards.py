"""The files of a checkpoint of Meta's: one a rank of model parallelism, which hold the same keys.

How their tensors are put together is Meta's own resharding (``llama_models/checkpoint.py``, ``reshard_mp``): those of
column-parallel layers along their rows, those of row-parallel ones along their columns, all others are the same in
every file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.combiners import OnTop, SideBySide
from l4convert.checkpoint.lazy import Derived, LazyTensor
from l4convert.checkpoint.pth_file import DOWNLOAD_HINT, PthFile, open_pth, open_together
from l4convert.checkpoint.remote import names_in
from l4convert.checkpoint.text import and_more, show
from l4convert.errors import InputError

# Of the image encoder, and what Meta's code drops as it loads (``load_hook`` of model.py) or never reads.
_VISION = ("vision_embeddings.", "vision_projection.")
_UNUSED = ("._extra_state", "_gate_stats_3E", ".expert_activation_DE", "freqs_cis", "freq_cis")
_UNUSED_KEYS = ("rope.freqs",)
MAX_SHARDS = 64
FLOATS = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT)


class Shards:
    """The text decoder's tensors of all files; which ones were asked for is kept in mind.

    Args:
        files: In the order of their ranks.

    Raises:
        InputError: The files do not hold the same keys with the same shapes and types.
    """

    def __init__(self, files: Sequence[PthFile]) -> None:
        self.files = tuple(files)
        self._tensors = tuple({k: v for k, v in file.tensors.items() if not is_unused(k)} for file in files)
        self._asked: set[str] = set()
        for file in files:
            _require_tensors(file)
        for file, tensors in zip(files[1:], self._tensors[1:], strict=True):
            _require_alike(files[0].path, self._tensors[0], file.path, tensors)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors[0]

    def parts(self, key: str) -> tuple[LazyTensor, ...]:
        """One tensor a file.

        Raises:
            InputError: There is none of this key.
        """
        if key not in self:
            hint = f"{DOWNLOAD_HINT}; if it is whole, params.json is another model's"
            raise InputError(f"{self.where(key)} is missing", hint)
        self._asked.add(key)
        return tuple(tensors[key] for tensors in self._tensors)

    def where(self, key: str) -> str:
        """A tensor as messages name it."""
        others = f" (and {len(self) - 1} more files)" if len(self) > 1 else ""
        return f"{show(self.files[0].path)}{others}: tensor '{show(key)}'"

    def require_all_used(self) -> None:
        """See that no tensor was left over.

        Raises:
            InputError: One was.
        """
        left = [key for key in self._tensors[0] if key not in self._asked]
        if left:
            what = f"is not one that params.json has{and_more(len(left) - 1)}"
            raise InputError(f"{self.where(left[0])} {what}", "compare params.json with the model it came from")


def check_float(tensor: LazyTensor, where: str) -> LazyTensor:
    """The tensor itself, if its elements are of a type that weights are kept in.

    Raises:
        InputError: They are not.
    """
    if tensor.dtype not in FLOATS:
        hint = "of quantized weights only Meta's FP8 and INT4 experts are read, with their scales beside them"
        raise InputError(f"{where} is {tensor.dtype.name}, expected {', '.join(t.name for t in FLOATS)}", hint)
    return tensor


def is_unused(key: str) -> bool:
    """Whether a key is not a weight of the text decoder."""
    return key.startswith(_VISION) or key.endswith(_UNUSED) or key in _UNUSED_KEYS


def open_shards(path: Path) -> Shards:
    """Open ``consolidated.NN.pth`` of a folder, or the one ``consolidated.pth``.

    Raises:
        InputError: One is missing, or there are files that Meta's code would take for others; or as :func:`open_pth`
            and :class:`Shards`.
    """
    names = [file.name for file in names_in(path, ".pth")]
    if names == ["consolidated.pth"]:
        return Shards([open_pth(path / names[0])])
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(max(1, min(len(names), MAX_SHARDS)))]
    extra = [name for name in names if name not in expected]
    absent = [name for name in expected if name not in names]
    if absent:
        raise InputError(f"{show(path / absent[0])}: no such file, though there are {len(names)} *.pth", DOWNLOAD_HINT)
    if extra:
        hint = "Meta's code takes every .pth of the folder for a part of the model; move others away"
        raise InputError(
            f"{show(path / extra[0])}: not a part of the model, which has {expected[-1]} as its last", hint
        )
    return Shards(open_together([path / name for name in names]))


def _require_tensors(file: PthFile) -> None:
    others = [key for key in file.others if not is_unused(key)]
    if others:
        what = f"'{show(others[0])}' is no tensor{and_more(len(others) - 1)}"
        raise InputError(f"{show(file.path)}: {what}", "a state dict has tensors only; save that alone")


def _require_alike(
    first: Path, tensors: Mapping[str, LazyTensor], other: Path, others: Mapping[str, LazyTensor]
) -> None:
    differing = [*(key for key in tensors if key not in others), *(key for key in others if key not in tensors)]
    if differing:
        holder = other if differing[0] in tensors else first
        what = f"tensor '{show(differing[0])}' is missing, which the other files have{and_more(len(differing) - 1)}"
        raise InputError(f"{show(holder)}: {what}", DOWNLOAD_HINT)
    for key, tensor in tensors.items():
        if (tensor.dims, tensor.dtype) != (others[key].dims, others[key].dtype):
            what = f"is {others[key].dtype.name} {list(others[key].dims)}, and {tensor.dtype.name} {list(tensor.dims)}"
            raise InputError(f"{show(other)}: tensor '{show(key)}' {what} in {show(first.name)}", DOWNLOAD_HINT)


class Rows(Derived):
    """Some rows of a matrix."""

    def __init__(self, part: LazyTensor, start: int, stop: int) -> None:
        super().__init__([part], part.dtype, [stop - start, part.dims[1]])
        self._start = start

    @property
    def by_columns(self) -> bool:
        return self.parts[0].by_columns

    def tile(self, batch: int, rows: slice, cols: slice) -> np.ndarray:
        return self.parts[0].tile(batch, slice(self._start + rows.start, self._start + rows.stop), cols)


def on_top(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Joined along the rows; a single one as it is."""
    return parts[0] if len(parts) == 1 else OnTop(parts)


def side_by_side(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Joined along the columns; a single one as it is."""
    return parts[0] if len(parts) == 1 else SideBySide(parts)
