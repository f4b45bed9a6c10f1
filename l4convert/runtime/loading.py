"""Load a graph with ONNX Runtime, under the settings with which it computes what the graph says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import require_file, require_inside, show
from l4convert.errors import InputError, backend_missing
from l4convert.runtime.cpu_form import cpu_form_of
from l4convert.runtime.providers import PROVIDERS, Provider, check_started, prepare

# Session configuration under which ONNX Runtime computes what the graph says. It rewrites MatMul with a dequantized
# INT4 matrix to MatMulNBits, by default (4) with activations rounded to int8; 1 keeps them float32.
SETTINGS = {"session.qdq_matmulnbits_accuracy_level": "1"}
_SUMMARY_CHARS = 240


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a graph is loaded.

    Attributes:
        threads: Threads for one operator; None: ONNX Runtime's choice.
        optimized: Whether ONNX Runtime may rewrite the graph; False: every node runs as it is written.
        fuse_quantized: Whether it may fuse DequantizeLinear with what follows. It does so even where no kernel takes
            FP8, and looks in the wrong graph for weights that a loop uses (1.31).
        folded: Whether what follows from weights alone is computed once and held; False: in every call. Packed experts
            (plugins/moe/packed.py) are eight times as large in float32.
        mapped: Whether weights stay in the mapped file and memory that is not used is given back, at the price of
            speed; False: kernels may copy weights into layouts of their own.
        cpu_form: Whether the graph computes in bfloat16, or has kernels that only CUDA has, and so has to be rewritten
            (l4convert/runtime/cpu_form.py).
        provider: Where it runs; the CPU takes what another provider has no kernel for.
        profile: How the path of the profile begins that the session writes when told to end it; None: no profile.
    """

    threads: int | None = None
    optimized: bool = True
    fuse_quantized: bool = True
    folded: bool = True
    mapped: bool = False
    cpu_form: bool = False
    provider: Provider = "cpu"
    profile: Path | None = None


def load_model(model: Path, loading: Loading) -> Any:
    """An ``onnxruntime.InferenceSession`` for the file ``model.onnx``.

    Raises:
        InputError: The file is absent or ONNX Runtime refuses it.
        BackendMissing: onnxruntime is not installed, or has no such provider, or there is no GPU.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise backend_missing("onnxruntime") from error
    if not require_file(model, "Convert the checkpoint again."):
        raise InputError(f"{show(model)}: is empty", "Convert the checkpoint again.")
    require_inside(model)
    prepare(onnxruntime, loading.provider)
    options = _options(onnxruntime, loading)
    source: str | bytes = str(model)
    if loading.cpu_form:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
        source = cpu_form_of(model)
    try:
        without = [] if loading.folded else ["ConstantFolding"]
        session = onnxruntime.InferenceSession(
            source, options, providers=list(PROVIDERS[loading.provider]), disabled_optimizers=without
        )
    except Exception as error:  # onnxruntime's exception types are private and differ between versions
        hint = "`l4convert verify` tells whether the artifact is whole; `l4convert doctor` which ONNX Runtime is here."
        raise InputError(f"{model}: ONNX Runtime cannot load it: {summary(error)}", hint) from error
    check_started(session, loading.provider)
    return session


def _options(onnxruntime: Any, loading: Loading) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors become exceptions, and are not printed as well
    if loading.threads is not None:
        options.intra_op_num_threads = loading.threads
    if not loading.optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if loading.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(loading.profile)
    settings = dict(SETTINGS)
    if not loading.fuse_quantized:
        settings["session.disable_quant_qdq"] = "1"
    if loading.mapped:
        settings["session.disable_prepacking"] = "1"
        options.enable_cpu_mem_arena = False
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    return options


def summary(error: Exception) -> str:
    """What ONNX Runtime says, on one line and without the C++ signatures in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text if len(text) <= _SUMMARY_CHARS else f"...{text[-_SUMMARY_CHARS:]}"
