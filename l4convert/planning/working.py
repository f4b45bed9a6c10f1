"""Memory that a call takes beside weights and caches: activations, logits, and what a runtime's kernels hand on.

Each term follows from the shapes of a call of B sequences and S new tokens over a context of T. What a runtime holds
beyond that was measured or read for each target; the source stands beside the term. The largest block is counted once,
because blocks follow each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType
from l4convert.graph_passes.lower_attention_to_tensor_scatter import SMALL_CACHE
from l4convert.planning.caches import Caches
from l4convert.planning.figures import Figure
from l4convert.planning.shards import Stored
from l4convert.planning.workspace import MULTIPROCESSORS, PART_TOKENS, AttentionCall, Experts, MoeCall
from l4convert.runtime.prefill import step_limit

#: New tokens of a prefill call, as `build --prefill-tokens` has it by default.
PREFILL_TOKENS = 512
# Of a process with CUDA: driver, kernels and libraries. About 0.3 GB were reported since kernels are loaded when they
# are needed, and over 1 GB before; the larger one is taken as a margin.
_CUDA_BYTES = 1_000_000_000
_CUDA_SOURCE = "github.com/pytorch/pytorch/issues/107667: 0.3 GB, 1 GB before CUDA 11.7; the larger"
# Kernels in an engine's plan, for a layer and a profile.
_KERNEL_BYTES = 6_000_000
_PROFILES = 2
# Interpreter and libraries of `generate` on the CPU.
_HOST_BYTES = 300_000_000
# Caches that grow, in all: 4.5 times their bytes (growing) and 6.5 times (windowed) were the peak of a prefill of
# tiny-scout to 8,192 and to 16,384 tokens; two of them are past and present.
_ARENA = 4
_ARENA_SOURCE = "measured on tiny-scout: 4.5 (growing) and 6.5 times (windowed) the caches in all"


@dataclass(frozen=True)
class Call:
    """One call of a graph on one GPU.

    Attributes:
        batch, new, context: Sequences, new tokens of each, tokens of each seen.
        ranks: GPUs that share heads, widths and vocabulary.
        bytes: Of an element of the compute type.
        caches: On this GPU.
        experts: How routed experts are stored.
    """

    config: DecoderConfig
    batch: int
    new: int
    context: int
    ranks: int
    bytes: int
    caches: Caches
    experts: Stored = "plain"

    @property
    def rows(self) -> int:
        """Tokens of the call."""
        return self.batch * self.new


def prefill_tokens(config: DecoderConfig, target: str, batch: int, context: int, most: int) -> int:
    """New tokens of the last call that reads a prompt of this length, where the most is in memory."""
    new = min(most, context, config.attention_chunk_size)
    return min(new, step_limit(config, context, batch)) if target in _ON_CPU else new


def element_bytes(compute: ComputeType) -> int:
    """Bytes of an activation."""
    return int(COMPUTE_TYPES[compute].itemsize)


def working_figures(target: str, call: Call) -> list[Figure]:
    """Bytes of a call of this target's runtime, term by term."""
    return [_residual(call), _widest_block(call, target), _logits(call), *_RUNTIME_TERMS[target](call)]


def host_figures(target: str, half: int, caches: Caches, batch: int, context: int) -> list[Figure]:
    """What ONNX Runtime on the CPU holds more than once.

    Args:
        target: Only those of the CPU have any.
        half: Bytes of weights in 16 bits.
        caches: On the machine.
        batch: Sequences.
        context: Tokens of each.
    """
    if target not in _ON_CPU:
        return []
    figures = []
    if half:
        source = "measured: opening tiny-scout's 33 MB of BF16 takes 100 MB"
        figures.append(Figure("weights in float32", 2 * half, "B", f"2 x {half:,} B; beside 16-bit weights", source))
    if caches.copies > 1:
        once = sum(caches.bytes(batch, context).values())
        arithmetic = f"{_ARENA} x {once:,} B; what grows is freed and allocated anew, layer by layer"
        figures.append(Figure("freed caches in the arena", _ARENA * once, "B", arithmetic, _ARENA_SOURCE))
    return figures


def runtime_figure(target: str, config: DecoderConfig) -> Figure:
    """What the runtime holds whatever is called."""
    if target in _ON_CPU:
        return Figure("runtime", _HOST_BYTES, "B", f"{_HOST_BYTES:,}: interpreter, ONNX Runtime and graph", "a margin")
    if target == "cuda":
        return Figure("runtime", _CUDA_BYTES, "B", f"{_CUDA_BYTES:,}: CUDA context and kernels", _CUDA_SOURCE)
    kernels = config.num_hidden_layers * _PROFILES * _KERNEL_BYTES
    arithmetic = (
        f"{_CUDA_BYTES:,} (CUDA context) + {config.num_hidden_layers} layers x {_PROFILES} profiles x"
        f" {_KERNEL_BYTES:,} (kernels in the plan)"
    )
    source = f"{_CUDA_SOURCE}; docs/guides/tensorrt.md: 6 MB of kernels for a layer and profile of TensorRT-RTX"
    return Figure("runtime", _CUDA_BYTES + kernels, "B", arithmetic, source)


def _residual(call: Call) -> Figure:
    hidden = call.config.hidden_size
    arithmetic = f"2 (stream and its norm) x {call.rows:,} tokens x {hidden:,} x {call.bytes} B"
    return Figure("residual stream", 2 * call.rows * hidden * call.bytes, "B", arithmetic)


def _widest_block(call: Call, target: str) -> Figure:
    config, ranks = call.config, call.ranks
    queries = config.num_attention_heads * config.head_dim // ranks
    keys = call.caches.heads * config.head_dim
    rows = f"{call.rows:,} tokens"
    blocks = [
        Figure(
            "attention block",
            2 * call.rows * (queries + keys) * call.bytes,
            "B",
            f"{rows} x (2 x {queries:,} query and result + 2 x {keys:,} key and value) x {call.bytes} B",
        )
    ]
    if any(layer.moe for layer in config.layers):
        top, width = config.num_experts_per_tok, config.intermediate_size // ranks
        each = 2 * config.hidden_size + 3 * width
        arithmetic = (
            f"{rows} x {top} experts x (2 x {config.hidden_size:,} input and result + 3 x {width:,}"
            f" gate, up and product) x {call.bytes} B"
        )
        if target == "tensorrt":  # what is inside of the plugin is its workspace
            top, each = 1, 2 * config.hidden_size
            arithmetic = f"{rows} x 2 x {config.hidden_size:,} input and result x {call.bytes} B"
        blocks.append(Figure("experts block", call.rows * top * each * call.bytes, "B", arithmetic))
    if not all(layer.moe for layer in config.layers):
        width = config.intermediate_size_mlp // ranks
        arithmetic = f"{rows} x 3 x {width:,} gate, up and product x {call.bytes} B"
        blocks.append(Figure("dense MLP block", 3 * call.rows * width * call.bytes, "B", arithmetic))
    widest = max(blocks, key=lambda block: block.value)
    return Figure(f"widest block: {widest.name.removesuffix(' block')}", widest.value, "B", widest.arithmetic)


def _logits(call: Call) -> Figure:
    vocabulary = call.config.vocab_size
    arithmetic = f"{call.rows:,} tokens x {vocabulary:,} x 4 B"
    value = 4 * call.rows * vocabulary
    if call.bytes != 4:
        own = vocabulary // call.ranks
        arithmetic += f" + {call.rows:,} x {own:,} x {call.bytes} B"
        value += call.rows * own * call.bytes
    return Figure("logits", value, "B", f"{arithmetic}; of every token, float32 and as they are computed")


def _scores(call: Call) -> list[Figure]:
    heads = call.config.num_attention_heads // call.ranks
    value = 4 * call.batch * heads * call.new * call.context
    arithmetic = f"{call.batch} x {heads} heads x {call.new:,} new tokens x {call.context:,} x 4 B"
    source = "ONNX Runtime's attention on the CPU holds the scores of one layer; steps of a prefill are cut to 512 MiB"
    return [Figure("attention scores", value, "B", arithmetic, source)]


def _cpu_terms(call: Call) -> list[Figure]:
    """GroupQueryAttention holds no scores: the same peak was measured with steps of 16 and of 128 tokens."""
    return _widened_caches(call) if call.caches.dtype == "fp8" else []


def _portable_terms(call: Call) -> list[Figure]:
    return [*_scores(call), *(_widened_caches(call) if call.caches.scaled_layers else [])]


def _widened_caches(call: Call) -> list[Figure]:
    """Where no kernel reads a quantized cache, its definition widens keys and values of the layer that is computed."""
    heads, width = call.caches.heads, call.caches.width
    value = 2 * 2 * call.batch * heads * width * call.context * 4
    arithmetic = f"2 (codes, values) x 2 (key, value) x {call.batch} x {heads} x {width} x {call.context:,} x 4 B"
    return [Figure("one layer's cache in float32", value, "B", arithmetic, "the operator's definition, layer by layer")]


def _cuda_terms(call: Call) -> list[Figure]:
    config = call.config
    width = max(config.intermediate_size, config.num_attention_heads * config.head_dim)
    value = config.hidden_size * width * call.bytes
    arithmetic = f"{config.hidden_size:,} x {width:,} x {call.bytes} B; attention holds no scores"
    source = "MatMulNBits widens a matrix for more than a few tokens; GroupQueryAttention is flash attention"
    return [Figure("one matrix, dequantized", value, "B", arithmetic, source)]


def _tensorrt_terms(call: Call) -> list[Figure]:
    """What the plugins ask for. Layers follow each other and share it, so the call that asks for the most counts."""
    terms = [max([*_attention_workspaces(call), *_expert_workspaces(call)], key=lambda figure: figure.value)]
    if call.experts == "dequantized":
        config, width = call.config, call.config.intermediate_size // call.ranks
        value = 3 * config.num_local_experts * config.hidden_size * width * call.bytes
        arithmetic = f"3 x {config.num_local_experts} experts x {config.hidden_size:,} x {width:,} x {call.bytes} B"
        source = "the plugin takes what it has no kernel for in the compute type; convert says why it was not packed"
        terms.append(Figure("one layer's experts, dequantized", value, "B", arithmetic, source))
    return terms


def _attention_workspaces(call: Call) -> list[Figure]:
    """Of a global and of a chunked layer."""
    config, caches = call.config, call.caches
    reaches = (
        (0, caches.global_bits, caches.global_layers),
        (caches.chunk, caches.chunked_bits, caches.chunked_layers),
    )
    figures = []
    for chunk, bits, layers in reaches:
        heads = config.num_attention_heads // call.ranks
        sizes = (heads, caches.heads, config.head_dim, chunk, call.batch, call.new, call.context)
        asked = AttentionCall(*sizes, element_bytes=max(1, bits // 8) if bits < 16 else 2)
        decode = asked.decode_bytes == asked.bytes
        arithmetic = (
            f"{asked.parts:,} parts x {asked.group} query heads x ({config.head_dim} + 2) x 4 B + 768;"
            f" parts of {PART_TOKENS:,} tokens, or a few for each of {MULTIPROCESSORS} multiprocessors"
            if decode
            else " + ".join(f"{size:,} ({name})" for name, size in asked.prefill_pieces.items())
        )
        if layers:
            figures.append(Figure("workspace: attention", asked.bytes, "B", arithmetic, _PLUGIN_SOURCE))
    return figures


def _expert_workspaces(call: Call) -> list[Figure]:
    config = call.config
    if not any(layer.moe for layer in config.layers):
        return []
    width = config.intermediate_size // call.ranks
    weights: Experts = "plain" if call.experts == "dequantized" else call.experts
    sizes = (config.num_local_experts, config.hidden_size, width, config.num_experts_per_tok, call.rows)
    pieces = MoeCall(*sizes, weights).pieces
    arithmetic = " + ".join(f"{size:,} ({name})" for name, size in pieces.items())
    return [Figure("workspace: experts", sum(pieces.values()), "B", arithmetic, _PLUGIN_SOURCE)]


_PLUGIN_SOURCE = "plugins/*/launch.cpp, which a test compares with this; layers share it"


def _rtx_terms(call: Call) -> list[Figure]:
    config, caches = call.config, call.caches
    terms = []
    if any(layer.moe for layer in config.layers):
        width = config.intermediate_size // call.ranks
        value = 3 * config.hidden_size * width * call.bytes
        arithmetic = f"3 matrices x {config.hidden_size:,} x {width:,} x {call.bytes} B"
        terms.append(Figure("one expert, dequantized", value, "B", arithmetic, "ADR 0014: decode scratch"))
    if call.context > SMALL_CACHE and caches.global_layers:
        slots = call.batch * call.context
        copy = 2 * caches.heads * caches.width * call.bytes
        arithmetic = f"{call.batch} x {call.context:,} slots x 2 (key, value) x {caches.heads} heads x {caches.width} x"
        arithmetic += f" {call.bytes} B; layers share it"
        terms.append(Figure("copy of a large cache", slots * copy, "B", arithmetic, _RTX_SOURCE))
        group = config.num_attention_heads // config.num_key_value_heads
        mask = caches.global_layers * slots * group * call.new * call.bytes
        arithmetic = f"{caches.global_layers} global layers x {call.batch} x {call.context:,} slots x {group} x"
        arithmetic += f" {call.new:,} new tokens x {call.bytes} B; each layer has its own"
        terms.append(Figure("masks", mask, "B", arithmetic, _RTX_SOURCE))
    return terms


_RUNTIME_TERMS: Mapping[str, Callable[[Call], list[Figure]]] = {
    "cpu": _cpu_terms,
    "portable": _portable_terms,
    "cuda": _cuda_terms,
    "tensorrt": _tensorrt_terms,
    "tensorrt-rtx": _rtx_terms,
}
# Scratch that TensorRT-RTX 1.7.1 plans for 1, 2 and 4 layers of Scout's attention over 131,072 slots: 0.538 GB for one
# new token whatever their number, and 1.221, 1.895 and 3.242 GB for 512: 0.537 GB, and 0.671 for each layer's mask.
_RTX_SOURCE = "measured: benchmarks/engine_forms.py, attention in 1, 2 and 4 layers"
# Targets that ONNX Runtime's CPU provider runs.
_ON_CPU = frozenset({"cpu", "portable"})
