"""Checkpoints whose weights are stored quantized: one file a method, one table of them, one form they are read into.

A method is named by ``quant_method`` of ``quantization_config`` in config.json, or is ModelOpt's where the folder has
``hf_quant_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping

from l4convert.checkpoint.quantized import compressed_tensors, fbgemm, modelopt
from l4convert.checkpoint.quantized.source import Reader, ReadWeights, Source
from l4convert.checkpoint.text import quote

__all__ = ["METHODS", "ReadWeights", "Reader", "Source", "read_quantized"]

# Value of ``quant_method`` -> what reads it.
METHODS: Mapping[str, Reader] = {
    compressed_tensors.NAME: compressed_tensors.read,
    fbgemm.NAME: fbgemm.read,
    modelopt.NAME: modelopt.read,
    "modelopt_fp4": modelopt.read,  # as some revisions of NVIDIA's NVFP4 checkpoints say
}


def read_quantized(method: object, source: Source) -> ReadWeights:
    """The weights of a quantized checkpoint.

    Args:
        method: What the file that describes the quantization calls it.
        source: The tensors; those that were used are taken out.

    Raises:
        InputError: A method, scheme or tensor that is unknown, missing or does not fit.
    """
    reader = METHODS.get(method) if isinstance(method, str) else None
    if reader is None:
        known = ", ".join(METHODS)
        source.config.fail("quant_method", f"is {quote(method)}: that cannot be read", f"supported: {known}")
    return reader(source)
