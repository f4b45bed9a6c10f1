"""The reference's weights where transformers cannot read a checkpoint by itself: unfused, or stored quantized.

Files are read with the safetensors library and quantized weights are decompressed with the library of those who
quantized them, not with our readers: an error there must not be in the reference as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from l4convert.checkpoint import Checkpoint
from l4convert.checkpoint.hf import MODELOPT
from l4convert.checkpoint.hf_config import QUANTIZATION_KEYS
from l4convert.errors import InputError, backend_missing
from l4convert.parity.reference_floats import decompress_fbgemm, decompress_modelopt, decompress_nvfp4
from l4convert.runtime.manifest import read_json

State = dict[str, Any]
# Where multimodal checkpoints keep the text decoder -> where Llama4ForCausalLM does; the first that fits.
_PREFIXES = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.": ""}


def state_dict(checkpoint: Checkpoint) -> State | None:
    """The weights by the names of ``Llama4ForCausalLM``; None where transformers reads the folder as it is.

    Raises:
        BackendMissing: The library that decompresses the weights is not installed.
        InputError: There is none that this code knows for the checkpoint's method.
    """
    if checkpoint.quantization is None and checkpoint.experts == "stacked":
        return None
    state = _load(checkpoint.files)
    if checkpoint.quantization is not None:
        config = quantization_config(checkpoint.path)
        method = str(config.get("quant_method"))
        if method not in DECOMPRESSORS:
            raise InputError(f"{checkpoint.path}: there is no reference for weights quantized by {method}")
        state = DECOMPRESSORS[method](state, config)
    return stack_experts({_text_name(key): value for key, value in state.items()})


def quantization_config(path: Path) -> Mapping[str, Any]:
    """The object of config.json that says how weights are quantized, or what ModelOpt says beside it."""
    values = read_json(path / "config.json")
    parts = (values, values.get("text_config") or {})
    found = (part[key] for part in parts for key in QUANTIZATION_KEYS if part.get(key))
    config: Mapping[str, Any] | None = next(found, None)
    return {"quant_method": "modelopt"} if config is None and (path / MODELOPT).exists() else config or {}


def decompress_compressed_tensors(state: State, config: Mapping[str, Any]) -> State:
    """Weights of compressed-tensors, decompressed by its own code in float32 (scales are widened, which is exact)."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_targets
    except ImportError as error:
        raise backend_missing("compressed_tensors") from error
    whole = QuantizationConfig.model_validate(_without_order(config))
    schemes = {target: scheme for scheme in whole.config_groups.values() for target in scheme.targets}
    result, modules = _by_module(state)
    for module, tensors in modules.items():
        scheme = schemes[match_targets(module, _module_like(module), schemes)[0]]
        compressor: Any = BaseCompressor.get_value_from_registry(scheme.format or whole.format)
        if "weight_global_scale" in tensors:
            result[f"{module}.weight"] = decompress_nvfp4(tensors, scheme)
            continue
        order = tensors.pop("weight_g_idx", None)
        if "weight_scale" in tensors:
            tensors["weight_scale"] = tensors["weight_scale"].float()
        if order is None:
            result[f"{module}.weight"] = compressor.decompress(tensors, scheme)["weight"]
        else:
            result[f"{module}.weight"] = _decompress_ordered(compressor, tensors, scheme, order)
    return result


# Value of ``quant_method`` -> a function of a state dict and that object of config.json.
DECOMPRESSORS: Mapping[str, Callable[[State, Mapping[str, Any]], State]] = {
    "compressed-tensors": decompress_compressed_tensors,
    "fbgemm_fp8": decompress_fbgemm,
    "modelopt": decompress_modelopt,
    "modelopt_fp4": decompress_modelopt,
}


def stack_experts(state: State) -> State:
    """The state dict with experts that are stored one by one joined as ``Llama4TextExperts`` has them."""
    import torch

    first = ".0.gate_proj.weight"
    for prefix in [key.removesuffix(first) for key in state if key.endswith(f".experts{first}")]:
        gate, up, down = (torch.stack([w.T for w in _experts(state, prefix, name)]) for name in ("gate", "up", "down"))
        state[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=-1)  # [E, H, 2I]
        state[f"{prefix}.down_proj"] = down  # [E, I, H]
    return state


def _load(files: Iterable[Path]) -> State:
    from safetensors.torch import load_file

    state: State = {}
    for file in files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
    return state


def _text_name(key: str) -> str:
    """The name in ``Llama4ForCausalLM`` of a tensor of the multimodal model's text decoder."""
    prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
    return _PREFIXES.get(prefix, "") + key[len(prefix) :]


def _experts(state: State, prefix: str, projection: str) -> Iterator[Any]:
    """Take the weights [out, in] of one projection out of a state dict, in the order of the experts."""
    expert = 0
    while (name := f"{prefix}.{expert}.{projection}_proj.weight") in state:
        yield state.pop(name)
        expert += 1


def _by_module(state: State) -> tuple[State, dict[str, State]]:
    """What is stored plainly, and by module the tensors of those whose weights have scales."""
    marked = {key.rpartition(".")[0] for key in state if key.endswith((".weight_scale", ".weight_packed"))}
    modules: dict[str, State] = {}
    plain: State = {}
    for key, value in state.items():
        module, _, name = key.rpartition(".")
        if module in marked and name != "bias":
            modules.setdefault(module, {})[name] = value
        else:
            plain[key] = value
    return plain, modules


def _module_like(module: str) -> Any:
    """A module of the class that patterns know the one of this name by."""
    import torch
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    kinds = {"embed_tokens": torch.nn.Embedding, "router": Llama4Router}
    kind: Any = kinds.get(module.rpartition(".")[2], torch.nn.Linear)
    return kind.__new__(kind)  # its class is all that counts


def _without_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without ``actorder``, whose kind with g_idx the library no longer takes."""
    groups = {
        name: {**group, "weights": {k: v for k, v in (group.get("weights") or {}).items() if k != "actorder"} or None}
        for name, group in config["config_groups"].items()
    }
    return {**config, "config_groups": groups}


def _decompress_ordered(compressor: Any, tensors: State, scheme: Any, order: Any) -> Any:
    """A weight whose columns are grouped by ``order`` [K]: decompressed with its groups side by side, and put back."""
    import torch
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

    bits = scheme.weights.num_bits
    sorted_columns = torch.argsort(order, stable=True)
    codes = unpack_from_int32(tensors["weight_packed"], bits, tensors["weight_shape"])[:, sorted_columns]
    weight = compressor.decompress({**tensors, "weight_packed": pack_to_int32(codes, bits)}, scheme)["weight"]
    return weight[:, torch.argsort(sorted_columns)]
