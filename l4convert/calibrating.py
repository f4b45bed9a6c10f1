"""Calibration as a phase of a conversion: after the weights and before the graph, in the unpublished folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from l4convert.checkpoint.config import DecoderConfig
from l4convert.emit.plan import WeightsPlan, plan_weights
from l4convert.emit.staging import reported
from l4convert.emit.write import serialize_model
from l4convert.frontend.compute import ComputeType
from l4convert.graph_passes.quantize_kv_cache import set_kv_scales
from l4convert.progress import Progress
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.kv_scales import Float32
from l4convert.runtime.calibration import CalibrationGraph, calibrate, without_logits
from l4convert.runtime.calibration_text import CalibrationText

FILE = "calibration.onnx"


@dataclass(frozen=True)
class Calibration:
    """What finds the scales of a conversion's caches.

    Attributes:
        plain: The same model without quantized caches, on the same weights file; changed by :meth:`finish`.
        plan: Of the weights file.
        config, compute: Of the model.
        form: Of ``plain``'s caches.
        cpu_form: Whether ONNX Runtime's CPU provider needs the graph rewritten.
    """

    plain: ir.Model
    plan: WeightsPlan
    config: DecoderConfig
    compute: ComputeType
    form: str
    cpu_form: bool
    scheme: KvScheme
    text: CalibrationText

    def check_weights(self, plan: WeightsPlan) -> None:
        """Require that the graph to calibrate and the one to write have one weights file, ``plan``.

        Raises:
            AssertionError: They differ, so a pass is wrong.
        """
        if self.plan.header != plan.header or _places(self.plan) != _places(plan):
            raise AssertionError("quantizing the caches changed the layout of the weights file")

    def finish(self, model: ir.Model, progress: Progress) -> Callable[[Path], None]:
        """What :func:`l4convert.emit.write_artifact` calls: calibrates, and puts the scales into ``model``."""

        def run(folder: Path) -> None:
            set_kv_scales(model, self.scales(folder, progress))

        return run

    def scales(self, folder: Path, progress: Progress) -> dict[str, Float32]:
        """Run the graph on the weights in ``folder``; nothing is left there.

        Raises:
            InputError: As :func:`calibrate`, or the graph cannot be written.
            BackendMissing: onnxruntime is not installed.
        """
        without_logits(self.plain)
        file = folder / FILE
        try:
            with reported(f"{FILE}: cannot be written"):
                file.write_bytes(serialize_model(self.plain, self.plan))
            graph = CalibrationGraph(file, self.config, self.form, self.compute, self.cpu_form)
            return calibrate(graph, self.scheme, self.text, progress)
        finally:
            file.unlink(missing_ok=True)


def calibration_of(
    plain: ir.Model,
    *,
    config: DecoderConfig,
    compute: ComputeType,
    form: str,
    cpu_form: bool,
    share_weights: bool,
    scheme: KvScheme,
    text: CalibrationText,
    quantized: WeightsPlan,
) -> Calibration:
    """Plan the calibration of a conversion whose weights are planned as ``quantized``."""
    plan = plan_weights(plain, share_weights)
    calibration = Calibration(plain, plan, config, compute, form, cpu_form, scheme, text)
    calibration.check_weights(quantized)
    return calibration


def _places(plan: WeightsPlan) -> list[tuple[str, str, int, int]]:
    return [(t.name, t.file, t.offset, t.nbytes) for t in (*plan.tensors, *plan.shared)]
