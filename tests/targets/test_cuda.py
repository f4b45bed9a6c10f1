"""Target cuda from end to end: convert, and run the artifact on the CPU as ``validate`` and ``generate`` do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from l4convert.checkpoint import open_checkpoint
from l4convert.emit.manifest import read_manifest
from l4convert.graph_passes import CANONICAL_PASSES
from l4convert.pipeline import ConvertOptions, convert
from l4convert.quantization.recipe import bundled_recipes, load_recipe
from l4convert.runtime.session import OrtSession
from tests.graph_passes.rounding import stored
from tests.graphs import canonical, op_counts, reference_logits, run_passes, token_ids

# compute type -> root mean square of the errors of logits over that of the logits. A token whose best experts are close
# may go to the other one in 16 bits, so single logits may be further off.
TOLERANCES = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}
# recipe -> contrib ops in bfloat16
KERNELS = {
    "none": {"MoE"},
    "keep": {"MoE"},  # of a checkpoint that has nothing quantized
    "int4": {"QMoE", "MatMulNBits"},
    "fp8": {"MatMulBlockQuantizedFp8Weight"},
    "fp8-experts": {"MatMulBlockQuantizedFp8Weight"},
}


@pytest.mark.parametrize("name", bundled_recipes())
def test_it_uses_its_kernels_and_no_function(scout_layout: Path, tmp_path: Path, name: str):
    options = ConvertOptions(checkpoint=scout_layout, output=tmp_path / "out", target="cuda", recipe=name)
    convert(options)
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert not model.functions
    found = {n.op_type for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain}
    assert found == {"GroupQueryAttention"} | KERNELS[name]
    assert op_counts(model)["GroupQueryAttention"] == 4


@pytest.mark.parametrize("compute", TOLERANCES)
@pytest.mark.parametrize("kv_cache", ["static", "growing"])
def test_an_artifact_equals_transformers_on_the_cpu(scout_layout: Path, tmp_path: Path, kv_cache: str, compute: str):
    options = ConvertOptions(
        checkpoint=scout_layout,
        output=tmp_path / "out",
        target="cuda",
        recipe="int4",
        kv_cache=kv_cache,
        compute=compute,
    )
    convert(options)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["compute"], manifest["calls"], manifest["target"]) == (compute, "any", "cuda")
    ids, quantized = token_ids(2), canonical(open_checkpoint(scout_layout))
    run_passes(quantized, *(row.name for row in CANONICAL_PASSES), recipe=load_recipe("int4"))
    expected = reference_logits(scout_layout, ids, stored(quantized))
    with OrtSession.open(tmp_path / "out", max_length=64) as session:
        for splits in ((29,), (5, 7, 1, 13, 3)):
            stream, pieces, done = session.start(2), [], 0
            for length in splits:
                pieces.append(stream.step(ids[:, done : done + length]))
                done += length
            error = np.concatenate(pieces, axis=1) - expected
            assert np.sqrt((error**2).mean() / (expected**2).mean()) <= TOLERANCES[compute]
