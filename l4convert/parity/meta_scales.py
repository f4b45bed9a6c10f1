"""Meta's quantized experts for Meta's own model: dequantized in torch, by the formulas of ``quantize_impls.py``.

What is read here is the same as in :mod:`l4convert.checkpoint.meta_experts`, but written anew over whole tensors, so
that an error there is not in the reference as well.
"""

from __future__ import annotations

from typing import Any

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.pth_file import open_pth

_KEYS = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}


def dequantized(tensors: dict[str, Any], checkpoint: Checkpoint, rank: int, args: Any) -> dict[str, Any]:
    """The tensors of one rank in float32.

    Args:
        tensors: As they are stored, by Meta's keys.
        checkpoint: Whose folder may have files with scales.
        rank: Which file.
        args: Meta's ``ModelArgs``.
    """
    plain = dict(tensors)
    for kind, decode in (("fp8", _fp8), ("int4", _int4)):
        file = checkpoint.path / f"{kind}_scales_{rank}.pt"
        if not file.exists():
            continue
        for name, scales in open_pth(file).tensors.items():
            prefix, _, weight = name.rpartition(".")
            key = f"{prefix}.{_KEYS[weight]}" if f"{prefix}.{_KEYS[weight]}" in plain else name
            width = plain[key].shape[-1]
            stacked = plain[key].reshape(args.moe_args.num_experts, -1, width)
            plain[key] = decode(stacked, scales.numpy()).reshape(-1, width)
    return {key: value.float() for key, value in plain.items()}


def _fp8(stored: Any, scales: Any) -> Any:
    """[E, K, N] E4M3 and [E, N]: ``f8f8bf16_rowwise`` multiplies the product of a row of the weights by its scale."""
    import torch

    return stored.float() * torch.from_numpy(scales.copy())[:, None, :]


def _int4(stored: Any, scales: Any) -> Any:
    """[E, K / 2, N] bytes and [E, K / group, N]: what ``pack_int4`` and ``int4_row_quantize`` did, undone."""
    import torch

    octets = stored.view(torch.int8)
    low = torch.bitwise_right_shift(torch.bitwise_left_shift(octets, 4), 4)
    high = torch.bitwise_right_shift(octets, 4)
    values = torch.stack([low, high], dim=2).flatten(1, 2).float()
    wide = torch.from_numpy(scales.copy())
    return values * wide.repeat_interleave(values.shape[1] // wide.shape[1], dim=1)
