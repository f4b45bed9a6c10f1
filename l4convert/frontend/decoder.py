"""The text decoder as plain ONNX, straight from the config: no tracing, no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from l4convert.checkpoint.combiners import transposed
from l4convert.checkpoint.config import DecoderConfig, LayerConfig
from l4convert.checkpoint.lazy import Constant, LazyTensor
from l4convert.errors import InputError
from l4convert.frontend.builder import Builder, initializer
from l4convert.frontend.compute import COMPUTE_TYPES, ComputeType, to_float32
from l4convert.frontend.rope import rotary_tables
from l4convert.plugins.long_context_attention import definition as attention
from l4convert.plugins.long_context_attention.definition import AttentionSpec, KvCache
from l4convert.plugins.moe import definition as moe

OPSET = 23
# That of opset 23 (onnx/onnx docs/Versioning.md): runtimes refuse models of a newer one whatever ops they use.
IR_VERSION = 11
# A RoPE layer that is not chunked has a table with a row for every position; beyond this it would outweigh the layer.
MAX_ROTARY_ANGLES = 1 << 24  # 2^18 positions of heads of 128

Experts = Literal["stacked", "unfused"]


def build_decoder(
    config: DecoderConfig,
    tensors: Mapping[str, LazyTensor],
    experts: Experts,
    kv_cache: KvCache,
    compute: ComputeType = "float32",
) -> ir.Model:
    """Build the canonical graph: standard ONNX ops only, inputs and outputs as DESIGN section 5 says.

    Args:
        config: The model's hyperparameters.
        tensors: Canonical names (those of transformers' ``Llama4ForCausalLM``) to lazy tensors.
        experts: Whether ``tensors`` holds stacked experts or one matrix each.
        kv_cache: The form of the cache.
        compute: The type of activations and caches. Logits are float32 whatever it is, and so is the router.

    Raises:
        InputError: A layer layout that the graph cannot express.
    """
    return _Decoder(config, tensors, experts, kv_cache, compute).model()


class _Decoder:
    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, LazyTensor],
        experts: Experts,
        kv_cache: KvCache,
        compute: ComputeType,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.experts = experts
        self.kv_cache: KvCache = kv_cache
        self.compute: ComputeType = compute
        self.dtype = COMPUTE_TYPES[compute]
        self.b = Builder()
        self.initializers: dict[str, ir.Value] = {}
        self.inputs = [
            _value("input_ids", ir.DataType.INT64, ["batch", "sequence"]),
            _value("attention_mask", ir.DataType.INT64, ["batch", "total_sequence"]),
        ]
        self.outputs: list[ir.Value] = []

    def model(self) -> ir.Model:
        config, b = self.config, self.b
        input_ids, attention_mask = self.inputs
        positions = token_positions(b, attention_mask)
        table = self.stored("model.embed_tokens.weight")
        hidden = self.cast(b.op("Gather", table, input_ids, axis=0, name="embed_tokens"), table, self.dtype)
        for number, layer in enumerate(config.layers):
            with b.scope(f"layers.{number}"):
                hidden = self.layer(number, layer, hidden, positions)
        hidden = self.norm("model.norm.weight", hidden)
        logits = to_float32(b, b.op("MatMul", hidden, self.head(), name="lm_head"), self.compute)
        logits = _named(logits, "logits", ir.DataType.FLOAT, ["batch", "sequence", config.vocab_size])
        graph = ir.Graph(
            self.inputs,
            [logits, *self.outputs],
            nodes=b.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET},
            name="llama4",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="l4convert")

    def layer(self, number: int, layer: LayerConfig, hidden: ir.Value, positions: ir.Value) -> ir.Value:
        b, prefix = self.b, f"model.layers.{number}"
        normed = self.norm(f"{prefix}.input_layernorm.weight", hidden)
        with b.scope("self_attn"):
            hidden = b.op("Add", hidden, self.attention(number, layer, normed, positions), name="residual")
        normed = self.norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        with b.scope("feed_forward"):
            block = self.experts_block if layer.moe else self.dense_block
            return b.op("Add", hidden, block(f"{prefix}.feed_forward", normed), name="residual")

    def attention(self, number: int, layer: LayerConfig, hidden: ir.Value, positions: ir.Value) -> ir.Value:
        prefix = f"model.layers.{number}.self_attn"
        spec = attention_spec(self.config, layer, self.kv_cache, self.compute)
        query, key, value = (self.linear(f"{prefix}.{p}_proj", hidden) for p in "qkv")
        past_key, past_value = self.cache_inputs(number, layer)
        cos, sin = self.rotary(number, layer)
        inputs = attention.Inputs(query, key, value, past_key, past_value, positions, cos, sin)
        merged, present_key, present_value = attention.build(self.b, spec, inputs)
        for name, present in (("key", present_key), ("value", present_value)):
            shape = self.cache_shape("present_sequence", layer)
            self.outputs.append(_named(present, f"present.{number}.{name}", self.dtype, shape))
        return self.linear(f"{prefix}.o_proj", merged)

    def cache_inputs(self, number: int, layer: LayerConfig) -> list[ir.Value]:
        batch, heads, length, width = self.cache_shape("past_sequence", layer)
        growing = self.kv_cache == "growing"
        shape = [batch, "past_heads", length, "past_head_dim"] if growing else [batch, heads, length, width]
        names = (f"past_key_values.{number}.{name}" for name in ("key", "value"))
        values = [_value(name, self.dtype, shape) for name in names]
        self.inputs += values
        # A client that does not know Llama 4 (optimum) may start with an empty past of another shape.
        return [self.b.reshape(value, [0, int(heads), -1, int(width)]) for value in values] if growing else values

    def cache_shape(self, length: str, layer: LayerConfig) -> list[str | int]:
        """Caches that may differ in length need dimension names of their own, or a runtime would hold them equal."""
        if self.kv_cache == "static":
            length = "max_sequence"  # one name for past and present: they may be one buffer
        if self.kv_cache != "growing" and layer.chunked:
            length = f"chunked_{length}"
        return ["batch", self.config.num_key_value_heads, length, self.config.head_dim]

    def rotary(self, number: int, layer: LayerConfig) -> tuple[ir.Value | None, ir.Value | None]:
        if not layer.rope:
            return None, None
        rows = self.config.attention_chunk_size if layer.chunked else self.config.max_position_embeddings
        most = MAX_ROTARY_ANGLES // (self.config.head_dim // 2)
        if rows > most:
            reach, key = (
                ("chunks", "attention_chunk_size") if layer.chunked else ("full attention", "max_position_embeddings")
            )
            raise InputError(
                f"config.json: layer {number} has RoPE over {reach} with {rows} positions, more than {most}",
                f"Llama 4 rotates chunks of 8192 positions; lower {key} to what the layer needs",
            )
        names = (f"rotary_{rows}.cos", f"rotary_{rows}.sin")
        if names[0] not in self.initializers:
            for name, table in zip(names, rotary_tables(self.config, rows), strict=True):
                self.initializers[name] = initializer(name, Constant(table))
        return self.initializers[names[0]], self.initializers[names[1]]

    def experts_block(self, prefix: str, hidden: ir.Value) -> ir.Value:
        config, b = self.config, self.b
        tokens = b.reshape(hidden, [-1, config.hidden_size])
        # In float32 whatever the compute type is: rounded logits would send some tokens to other experts.
        router = self.matrix(f"{prefix}.router.weight", ir.DataType.FLOAT)
        logits = b.op("MatMul", to_float32(b, tokens, self.compute), router, name="router")
        spec = moe.MoESpec(
            num_experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            top_k=config.num_experts_per_tok,
            compute=self.compute,
        )
        with b.scope("experts"):
            if self.experts == "stacked":
                weights = [self.weight(f"{prefix}.experts.{n}_proj") for n in ("gate_up", "down")]
                routed = moe.build(b, spec, moe.Inputs(tokens, logits, *weights))
            else:
                routed = moe.build_unfused(b, spec, tokens, logits, list(self.unfused(f"{prefix}.experts")))
        shared = self.swiglu(f"{prefix}.shared_expert", hidden)
        return b.op("Add", shared, b.op("Reshape", routed, b.op("Shape", hidden)))

    def unfused(self, prefix: str) -> Iterator[moe.Expert]:
        for number in range(self.config.num_local_experts):
            yield moe.Expert(*(self.matrix(f"{prefix}.{number}.{n}_proj.weight") for n in ("gate", "up", "down")))

    def dense_block(self, prefix: str, hidden: ir.Value) -> ir.Value:
        return self.swiglu(prefix, hidden)

    def swiglu(self, prefix: str, hidden: ir.Value) -> ir.Value:
        gate, up = (self.linear(f"{prefix}.{n}_proj", hidden) for n in ("gate", "up"))
        return self.linear(f"{prefix}.down_proj", moe.swiglu(self.b, gate, up, self.compute))

    def linear(self, prefix: str, hidden: ir.Value) -> ir.Value:
        """``hidden @ weight.T + bias``, the bias where the checkpoint has one."""
        product = self.b.op("MatMul", hidden, self.matrix(f"{prefix}.weight"), name=prefix.rpartition(".")[2])
        bias = f"{prefix}.bias"
        return self.b.op("Add", product, self.weight(bias)) if bias in self.tensors else product

    def norm(self, name: str, hidden: ir.Value) -> ir.Value:
        scale = self.weight(name)
        epsilon = self.config.rms_norm_eps
        return self.b.op("RMSNormalization", hidden, scale, axis=-1, epsilon=epsilon, name=name.split(".")[-2])

    def head(self) -> ir.Value:
        if not self.config.tie_word_embeddings:
            return self.matrix("lm_head.weight")
        return self.b.op("Transpose", self.weight("model.embed_tokens.weight"), perm=[1, 0])

    def matrix(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A weight of ``torch.nn.Linear``, [out,in], as MatMul takes it: [in,out]."""
        stored = self.stored(name, transposed)
        return self.cast(stored, stored, dtype or self.dtype)

    def weight(self, name: str) -> ir.Value:
        stored = self.stored(name)
        return self.cast(stored, stored, self.dtype)

    def stored(self, name: str, layout: Callable[[LazyTensor], LazyTensor] = lambda tensor: tensor) -> ir.Value:
        """A weight in the checkpoint's own type."""
        if name not in self.initializers:
            self.initializers[name] = initializer(name, layout(self.tensors[name]))
        return self.initializers[name]

    def cast(self, value: ir.Value, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
        """What comes from a weight, in the type it is computed with: weights keep the checkpoint's type on disk."""
        if weight.dtype == dtype:
            return value
        return self.b.op("Cast", value, to=int(dtype), name=f"{value.name}/cast")


def attention_spec(
    config: DecoderConfig, layer: LayerConfig, kv_cache: KvCache, compute: ComputeType = "float32"
) -> AttentionSpec:
    """The attributes of one layer's attention."""
    tuned = config.attn_temperature_tuning and not layer.rope
    return AttentionSpec(
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        chunk_size=config.attention_chunk_size if layer.chunked else 0,
        rope=layer.rope,
        qk_norm_eps=config.rms_norm_eps if config.use_qk_norm and layer.rope else 0.0,
        floor_scale=float(config.floor_scale) if tuned else 1.0,
        attn_scale=config.attn_scale if tuned else 0.0,
        kv_cache=kv_cache,
        compute=compute,
    )


def token_positions(b: Builder, attention_mask: ir.Value) -> ir.Value:
    """Position of every token in its own sequence, [B,T]: padding, on whichever side, has none and gets -1.

    This runs over all columns in every call: three plain operators take a tenth of the time of comparing and choosing.
    """
    count = b.op("CumSum", attention_mask, b.constant(1))
    return b.op("Sub", b.op("Mul", count, attention_mask), b.constant(1), name="positions")


def _value(name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _named(value: ir.Value, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
