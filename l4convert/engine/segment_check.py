"""Run the segments one after the other in ONNX Runtime and compare with the whole graph, before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from l4convert.emit.write import MODEL_FILE
from l4convert.engine.jobs import BuildPlan
from l4convert.engine.network import is_cache
from l4convert.engine.segments import HIDDEN_INPUT, HIDDEN_OUTPUT
from l4convert.errors import CheckFailed, InputError, backend_missing
from l4convert.progress import Progress

#: Largest |difference| of an output, relative to its largest |value|. The same nodes run on the same numbers; only
#: ONNX Runtime's choice of what to fuse may differ at a cut.
TOLERANCE = 1e-6
# Slots of the caches, and new tokens of the two calls: a prefill and a decode step.
_SLOTS = 16
_CALLS = (7, 1)
Arrays = dict[str, np.ndarray]


def check_segments(plan: BuildPlan, progress: Progress) -> None:
    """Compare logits and caches of the chain of segments with the whole graph's, in a prefill and a decode call.

    Raises:
        CheckFailed: They differ.
        InputError: ONNX Runtime cannot run a graph.
        BackendMissing: onnxruntime is not installed.
    """
    folder = plan.out / MODEL_FILE
    with progress.task("Checking segments", total=len(plan.segments) + 1, unit="graphs") as task:
        expected = _calls([plan.whole], folder, plan.config.vocab_size, task.advance)
        actual = _calls(list(plan.segments), folder, plan.config.vocab_size, task.advance)
    for name, values in expected.items():
        _compare(name, values, actual[name])


def _compare(name: str, expected: np.ndarray, actual: np.ndarray) -> None:
    if not np.isfinite(actual).all():
        raise CheckFailed(f"segments: {name} is not finite")
    difference = float(np.abs(actual - expected).max(initial=0.0))
    limit = TOLERANCE * float(np.abs(expected).max(initial=0.0))
    if not difference <= limit:
        raise CheckFailed(
            f"segments: {name} differs from the whole graph's by {difference:.3g}, more than {limit:.3g}",
            "build it as one engine, without --layers-per-engine",
        )
