"""What TensorRT-RTX makes of different forms of experts and of attention: size of the plan, and scratch memory.

    python benchmarks/engine_forms.py [--experts 4 --hidden 1024 --width 2048] [--sm 8.9]

No GPU is needed, and none of this is a time. Scratch memory tells what is written out between kernels: a form whose
scratch grows with the experts' size in 16 bits dequantizes them all in every call, whatever its plan looks like.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import Constant
from l4convert.frontend.builder import Builder, initializer
from l4convert.graph_passes import fuse_experts, lower_attention_to_tensor_scatter, lower_moe_to_loop
from l4convert.graph_passes.editing import attributes_of, clean_up
from l4convert.plugins.long_context_attention import definition as attention
from l4convert.plugins.moe import definition as moe
from l4convert.quantization.recipe import load_recipe

BLOCK = 128
BF16 = ir.DataType.BFLOAT16


def value(name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def model_of(b: Builder, inputs: list[ir.Value], outputs: dict[str, ir.Value]) -> ir.Model:
    for name, result in outputs.items():
        result.name, result.type = name, result.type or ir.TensorType(BF16)
    graph = ir.Graph(inputs, list(outputs.values()), nodes=b.nodes, opset_imports={"": 24, "l4convert": 1})
    for node in ir.traversal.RecursiveGraphIterator(graph):
        stored = [v for v in node.inputs if v is not None and v.const_value is not None and v.producer() is None]
        graph.initializers.update({str(v.name): v for v in stored})
    return ir.Model(graph, ir_version=11)


class Experts:
    """One layer of experts with random INT4 weights, written in different forms."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        self.spec = moe.MoESpec(experts, hidden, width, 1, compute="bfloat16")
        self.x = value("x", BF16, ["tokens", hidden])
        self.logits = value("logits", ir.DataType.FLOAT, ["tokens", experts])
        self.b = Builder("moe")
        random = np.random.default_rng(0)
        self.stored = {}
        for name, shape in (("gate_up", (experts, hidden, 2 * width)), ("down", (experts, width, hidden))):
            codes = random.integers(-8, 8, shape, np.int8).astype(ml_dtypes.int4)
            scales = random.random((experts, shape[1] // BLOCK, shape[2]), np.float32).astype(ml_dtypes.bfloat16)
            self.stored[name] = (codes, scales)

    @property
    def weights(self) -> int:
        return sum(codes.size for codes, _ in self.stored.values())

    def stacks(self, b: Builder) -> list[ir.Value]:
        return [
            b.op(
                "DequantizeLinear",
                initializer(f"{name}_int4", Constant(codes)),
                initializer(f"{name}_scale", Constant(scales)),
                axis=1,
                block_size=BLOCK,
            )
            for name, (codes, scales) in self.stored.items()
        ]

    def matrices(self, b: Builder, expert: int) -> list[ir.Value]:
        return [
            b.op(
                "DequantizeLinear",
                initializer(f"{name}_int4_{expert}", Constant(np.ascontiguousarray(codes[expert]))),
                initializer(f"{name}_scale_{expert}", Constant(np.ascontiguousarray(scales[expert]))),
                axis=0,
                block_size=BLOCK,
            )
            for name, (codes, scales) in self.stored.items()
        ]

    def routed(self) -> tuple[ir.Value, ir.Value]:
        """The tokens, scaled, and the expert of each."""
        b = self.b
        score = b.op("Sigmoid", b.op("ReduceMax", self.logits, b.constant([1]), keepdims=1))
        scaled = b.op("Mul", self.x, b.op("Cast", score, to=int(BF16)))
        return scaled, b.op("ArgMax", self.logits, axis=1, keepdims=0)

    def swiglu(self, b: Builder, rows: ir.Value, gate_up: ir.Value, down: ir.Value) -> ir.Value:
        gate, up = b.node("Split", [b.op("MatMul", rows, gate_up)], outputs=2, axis=-1, num_outputs=2)
        return b.op("MatMul", moe.swiglu(b, gate, up, "bfloat16"), down)

    def model(self, output: ir.Value) -> ir.Model:
        return model_of(self.b, [self.x, self.logits], {"y": output})

    def gather(self) -> ir.Model:
        rows, expert = self.routed()
        chosen = [self.b.op("Gather", stack, expert, axis=0) for stack in self.stacks(self.b)]
        rows = self.b.op("Unsqueeze", rows, self.b.constant([1]))
        return self.model(self.b.op("Squeeze", self.swiglu(self.b, rows, *chosen), self.b.constant([1])))

    def dense(self) -> ir.Model:
        return self.model(moe.build(self.b, self.spec, moe.Inputs(self.x, self.logits, *self.stacks(self.b))))

    def branches(self) -> ir.Model:
        b = self.b
        rows, expert = self.routed()
        total = b.op("Mul", self.x, b.constant(0.0, ml_dtypes.bfloat16))
        for number in range(self.spec.num_experts):
            mine = b.op("Equal", expert, b.constant(number))
            any_mine = b.op("ReduceMax", b.op("Cast", mine, to=int(ir.DataType.FLOAT)), keepdims=0)
            then, otherwise = Builder(f"then{number}"), Builder(f"else{number}")
            mask = then.op("Unsqueeze", then.op("Cast", mine, to=int(BF16)), then.constant([1]))
            result = self.swiglu(then, then.op("Mul", rows, mask), *self.matrices(then, number))
            branch = {
                "then_branch": ir.Graph([], [then.op("Add", total, result)], nodes=then.nodes, name="then"),
                "else_branch": ir.Graph([], [otherwise.op("Identity", total)], nodes=otherwise.nodes, name="else"),
            }
            (total,) = b.node("If", [b.op("Cast", any_mine, to=int(ir.DataType.BOOL))], **branch)
        return self.model(total)

    def loops(self) -> ir.Model:
        b = self.b
        rows, expert = self.routed()
        total = b.op("Mul", self.x, b.constant(0.0, ml_dtypes.bfloat16))
        tokens = b.op("Squeeze", b.dim(self.x, 0))
        every = b.op("Range", b.constant(0), tokens, b.constant(1))
        for number in range(self.spec.num_experts):
            mine = b.op("Equal", expert, b.constant(number))
            count = b.op("ReduceMax", b.op("Cast", mine, to=int(ir.DataType.INT64)), keepdims=0)
            body = Builder(f"loop{number}")
            turn = value(f"turn{number}", ir.DataType.INT64, [])
            go_on = value(f"go_on{number}", ir.DataType.BOOL, [])
            so_far = value(f"so_far{number}", BF16, ["tokens", self.spec.hidden_size])
            mask = body.op("Unsqueeze", body.op("Cast", mine, to=int(BF16)), body.constant([1]))
            # Rows depend on the turn, or the builder would compute all experts before the loops.
            place = body.op("Mod", body.op("Add", every, turn), tokens)
            tile = body.op("Gather", body.op("Mul", rows, mask), place, axis=0)
            result = self.swiglu(body, tile, *self.matrices(body, number))
            outputs = [body.op("Identity", go_on), body.op("Add", so_far, result)]
            for made, like in zip(outputs, (go_on, so_far), strict=True):
                made.type, made.shape = like.type, like.shape
            graph = ir.Graph([turn, go_on, so_far], outputs, nodes=body.nodes, name=f"loop{number}")
            (total,) = b.node("Loop", [count, b.constant(True, np.bool_), total], body=graph)
        return self.model(total)

    def packed(self) -> ir.Model:
        """What ``lower_moe_to_loop`` makes of a call."""
        empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 24, "l4convert": 1}), ir_version=11)
        overload = fuse_experts.declare(empty, self.spec)
        inputs = [self.x, self.logits, *self.stacks(self.b)]
        (output,) = self.b.node(moe.OP_TYPE, inputs, domain=moe.DOMAIN, overload=overload, **attributes_of(self.spec))
        model = self.model(output)
        model.functions.update(empty.functions)
        lower_moe_to_loop.run(model, load_recipe("int4"))
        return model


def attention_model(capacity: int, folded: bool) -> ir.Model:
    """A layer of Scout's shape over a cache of so many slots, as ``lower_attention_to_tensor_scatter`` has it."""
    spec = attention.AttentionSpec(40, 8, 128, 0, False, 0.0, 1.0, 0.0, "static", "bfloat16")
    spec = spec if folded else dataclasses.replace(spec, chunk_size=capacity)
    lower_attention_to_tensor_scatter.SMALL_CACHE = 0 if folded else capacity
    b = Builder("attention")
    width, kv_width = spec.num_heads * spec.head_dim, spec.kv_num_heads * spec.head_dim
    tokens = [value(n, BF16, [1, "tokens", w]) for n, w in (("q", width), ("k", kv_width), ("v", kv_width))]
    caches = [value(n, BF16, [1, spec.kv_num_heads, capacity, spec.head_dim]) for n in ("past_key", "past_value")]
    positions = value("positions", ir.DataType.INT64, [1, "total"])
    inputs = attention.Inputs(*tokens, *caches, positions, None, None)
    merged, key, present = lower_attention_to_tensor_scatter.build(b, spec, inputs)
    for result, cache in ((key, caches[0]), (present, caches[1])):
        result.shape = cache.shape
    return model_of(b, [*tokens, *caches, positions], {"y": merged, "present_key": key, "present_value": present})


def attention_layers(layers: int, capacity: int) -> ir.Model:
    """Folded attention of Scout's shape, layer after layer, each with its own projections and caches."""
    spec = attention.AttentionSpec(40, 8, 128, 0, False, 0.0, 1.0, 0.0, "static", "bfloat16")
    b = Builder("attention")
    hidden = spec.num_heads * spec.head_dim
    widths = {"q": hidden, "k": spec.kv_num_heads * spec.head_dim, "v": spec.kv_num_heads * spec.head_dim}
    x, positions = value("x", BF16, [1, "tokens", hidden]), value("positions", ir.DataType.INT64, [1, "total"])
    inputs, outputs = [x, positions], {}
    for i in range(layers):
        caches = [value(f"past_{n}{i}", BF16, [1, spec.kv_num_heads, capacity, spec.head_dim]) for n in "kv"]
        weights = {n: Constant(np.full((hidden, w), 0.01, ml_dtypes.bfloat16)) for n, w in widths.items()}
        new = [b.op("MatMul", x, initializer(f"{n}{i}", weight)) for n, weight in weights.items()]
        operands = attention.Inputs(*new, *caches, positions, None, None)
        merged, *presents = lower_attention_to_tensor_scatter.build(b, spec, operands)
        for name, result, cache in zip("kv", presents, caches, strict=True):
            result.shape = cache.shape
            outputs[f"present_{name}{i}"] = result
        inputs += caches
        x = b.op("Add", x, merged)
    return model_of(b, inputs, outputs | {"y": x})


def build(model: ir.Model, sm: str, shapes: dict[str, int]) -> dict[str, Any]:
    """Plan bytes and scratch bytes, or ``error``; ``shapes``: the most of each symbolic dimension."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # the module has no type information
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(f"{severity.name}: {message}")

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network()
    clean_up(model)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return {"error": str(parser.get_error(0)).splitlines()[0]}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm.replace('.', '')}"), 0)
    profile = builder.create_optimization_profile()
    for source in model.graph.inputs:
        assert source.shape is not None
        least, most = ([shapes.get(str(d), d) if not isinstance(d, int) else d for d in source.shape] for _ in (0, 1))
        least = [1 if not isinstance(d, int) else d for d in source.shape]
        profile.set_shape(source.name, least, most, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        errors = [line for line in log.lines if line.startswith("ERROR")]
        short = re.search(r"MyelinCheckException: [^(]*\([^)]*\)[^(]*", errors[0]) if errors else None
        return {"error": short.group(0) if short else "".join(errors)[:120]}
    scratch = next(int(m.group(1)) for line in log.lines if (m := re.search(r"Max Scratch Memory: (\d+)", line)))
    return {"plan_bytes": plan.nbytes, "scratch_bytes": scratch}


FORMS: dict[str, Callable[[Experts], ir.Model]] = {
    "DequantizeLinear, Gather": Experts.gather,
    "all experts": Experts.dense,
    "If for each expert": Experts.branches,
    "Loop for each expert": Experts.loops,
    "packed words, one Loop": Experts.packed,
}


def expert_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for form, make in FORMS.items():
        for tokens in (1, 8, 512):
            experts = Experts(options.experts, options.hidden, options.width)
            result = build(make(experts), options.sm, {"tokens": tokens})
            yield {"form": form, "tokens": tokens, "weights": experts.weights, **result}


def attention_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for capacity in (8192, 16384, 131072):
        for folded in (False, True):
            for tokens in (1, 8, 512):
                result = build(attention_model(capacity, folded), options.sm, {"tokens": tokens, "total": capacity})
                form = "heads folded into tokens" if folded else "40 heads on 8"
                yield {"form": form, "capacity": capacity, "tokens": tokens, **result}
    for count in (1, 2, 4):
        for tokens in (1, 512):
            result = build(attention_layers(count, 131072), options.sm, {"tokens": tokens, "total": 131072})
            yield {"form": f"folded, {count} layers", "capacity": 131072, "tokens": tokens, **result}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    for row in rows:
        place = f"{row.get('capacity', ''):>7} {row['tokens']:>4}"
        if "error" in row:
            print(f"{row['form']:26} {place}  refused: {row['error'][:70]}")
            continue
        each = f"{row['plan_bytes'] / row['weights']:.3f} B/weight" if "weights" in row else ""
        print(
            f"{row['form']:26} {place}  plan {row['plan_bytes'] / 1e6:8.1f} MB {each:14}"
            f" scratch {row['scratch_bytes'] / 1e6:9.2f} MB"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--sm", default="8.9", help="compute capability to build for")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    experts, layers = list(expert_rows(options)), list(attention_rows(options))
    size = 3 * options.experts * options.hidden * options.width
    sizes = (
        f"{size / 2e6:.1f} MB in 4 bits, {size * 2e-6:.1f} MB in BF16, an expert {size * 2e-6 / options.experts:.1f} MB"
    )
    show(f"{options.experts} experts, INT4, {sizes}, SM {options.sm}  (tokens)", experts)
    show(f"Attention of one layer, BF16, SM {options.sm}; a cache is 4096 bytes a slot  (capacity, tokens)", layers)
    if options.json:
        options.json.write_text(
            json.dumps({"sm": options.sm, "experts": experts, "attention": layers}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
