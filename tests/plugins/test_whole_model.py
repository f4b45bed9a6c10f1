"""A whole model as ``convert --target tensorrt`` writes it, every call of ours through its plugin: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from l4convert.checkpoint import open_checkpoint
from l4convert.engine.network import with_plugin_nodes
from l4convert.quantization.recipe import load_recipe
from tests.checkpoints import write_random_checkpoint
from tests.graphs import lowered
from tests.in_place import InPlaceClient
from tests.plugins.stand_in import StandIn
from tests.plugins.test_conformance import LARGEST_ERROR, relative_error, run_plugin


def test_a_model_through_its_plugins_gives_the_logits_of_the_functions(gpu: StandIn, tmp_path: Path) -> None:
    """A chunked and a global layer with INT4 experts: a chunk, then one token at a time into the next one."""
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint", num_hidden_layers=2, no_rope_layers=[1, 0])
    source = open_checkpoint(checkpoint)
    model = lowered(source, "tensorrt", "static", load_recipe("int4"), "float16")
    client = InPlaceClient(model, source.config, "float16")
    chunk, ids = source.config.attention_chunk_size, np.random.default_rng(0).integers(0, 128, (1, 10))
    calls = [(0, chunk), *((p, p + 1) for p in range(chunk, ids.shape[1]))]
    expected = client.logits(ids, [end - begin for begin, end in calls])
    caches = {name: value.numpy() for name, value in client.fresh(1).items()}
    evaluator, logits = _evaluator(with_plugin_nodes(ir.to_proto(model)), gpu), []
    for begin, end in calls:
        mask = np.ones((1, end), np.int64)
        results = evaluator.run(None, {"input_ids": ids[:, begin:end], "attention_mask": mask, **caches})
        outputs: dict[str, Any] = dict(zip(evaluator.output_names, results, strict=True))
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        logits.append(outputs["logits"].astype(np.float32))
    found = np.concatenate(logits, axis=1)
    assert relative_error(found, expected) < LARGEST_ERROR
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))
    names = {launched.kernel.name.split("_")[0] for launched in gpu.launches}
    assert names == {"attention", "moe"}


def _evaluator(model: onnx.ModelProto, gpu: StandIn) -> ReferenceEvaluator:
    return ReferenceEvaluator(model, new_ops=[_op(name, gpu) for name in ("MoE", "LongContextAttention")])


def _op(name: str, gpu: StandIn) -> Any:
    """The operator for onnx's own evaluator: a plugin, with the fields that the node's attributes become."""

    def run(self: Any, *inputs: Any, **_: Any) -> tuple[np.ndarray, ...]:
        found = {each.name: onnx.helper.get_attribute_value(each) for each in self.onnx_node.attribute}
        fields = {key: value.decode() if isinstance(value, bytes) else value for key, value in found.items()}
        results = run_plugin(gpu, name, fields, [np.asarray(each) for each in inputs], in_place=True)
        return tuple(result.astype(np.float16) for result in results)

    return type(name, (OpRun,), {"op_domain": "l4convert", "_run": run})
