"""Comparing what is read with what the library that made it dequantizes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from l4convert.checkpoint import open_checkpoint
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.parity.reference_weights import stack_experts, state_dict


def assert_equal_to_library(path: Path) -> int:
    """Every weight equals, bit for bit, what the library computes in float32; returns how many there are."""
    import torch

    checkpoint = open_checkpoint(path)
    theirs = state_dict(checkpoint)
    assert theirs is not None
    ours = {name: torch.from_numpy(read_in_pieces(t).astype(np.float32)) for name, t in checkpoint.tensors.items()}
    ours = stack_experts(ours)
    assert set(ours) <= set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].float()), name
    return len(ours)


def read_in_pieces(tensor: LazyTensor) -> np.ndarray:
    """The whole tensor, from tiles that begin and end anywhere."""
    batch, rows, cols = tensor.matrix
    result = np.empty(tensor.matrix, tensor.dtype.numpy())
    for b in range(batch):
        for some in _pieces(rows):
            for columns in _pieces(cols):
                result[b, some, columns] = tensor.tile(b, some, columns)
    return result.reshape(tensor.dims)


def _pieces(length: int) -> list[slice]:
    cuts = [0, *(at for at in (5, 22, 33) if at < length), length]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
