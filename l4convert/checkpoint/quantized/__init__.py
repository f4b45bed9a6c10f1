"""Checkpoints whose weights are stored quantized: one file a method, one table of them, one form they are read into.

A method is named by ``quant_method`` of ``quantization_config`` in config.json, or is ModelOpt's where the folder has
``hf_quant_config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from l4convert.checkpoint.combiners import cast
from l4convert.checkpoint.lazy import LazyTensor
from l4convert.checkpoint.quantized import compressed_tensors, fbgemm, modelopt
from l4convert.checkpoint.quantized.source import FLOAT_SCALES, Reader, ReadWeights, Source, checked
from l4convert.checkpoint.text import quote

__all__ = ["METHODS", "ReadWeights", "Reader", "Source", "read_quantized"]

EXPERTS = ".feed_forward.experts."
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
    read = reader(source)
    return ReadWeights({**read.tensors, **dict(_other_experts(read.tensors, source))}, read.words)


def _other_experts(made: Mapping[str, LazyTensor], source: Source) -> Iterator[tuple[str, LazyTensor]]:
    """Experts that are not quantized beside others of their layer that are: of the same type, so that they can be
    stacked."""
    layers = {name.partition(EXPERTS)[0] for name in made if EXPERTS in name}
    for name, shape in source.expected.items():
        stem, experts, _ = name.partition(EXPERTS)
        stored = source.stored.get(name)
        if experts and stem in layers and stored is not None:
            checked(stored, FLOAT_SCALES, shape)
            source.take(name)
            yield name, cast(stored, ir.DataType.FLOAT)
