"""ONNX models whose weights lie elsewhere than they should, or that are no models, as ``optimize`` reads them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import cut, edit_model, folder_instead, link, outside, pipe, remove, sparse, text

MODEL, DATA = "model.onnx", "weights.bin"
SIDE, NBYTES = 32, 32 * 32 * 4


def external(name: str, offset: int) -> TensorProto:
    """A weight [32, 32] in the file beside the model."""
    dims = (SIDE, SIDE)
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", str(offset)), ("length", str(NBYTES))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def base(folder: Path) -> None:
    """Three products, one with a weight in the model and two with weights beside it."""
    folder.mkdir(parents=True)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", SIDE]) for name in "xy")
    inline = numpy_helper.from_array(np.eye(SIDE, dtype=np.float32), "inline")
    nodes = [
        helper.make_node("MatMul", ["x", "inline"], ["a"]),
        helper.make_node("MatMul", ["a", "first"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [inline, external("first", 0), external("second", NBYTES)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (folder / MODEL).write_bytes(model.SerializeToString())
    (folder / DATA).write_bytes(np.random.default_rng(0).normal(0, 0.1, 2 * SIDE * SIDE).astype(np.float32).tobytes())


def first(change: Callable[[TensorProto], object], *names: str) -> tuple[Damage, tuple[str, ...]]:
    """Change the first external tensor."""
    return edit_model(MODEL, lambda proto: change(proto.graph.initializer[1])), (MODEL, "first", *names)


def put(key: str, value: str, *names: str) -> tuple[Damage, tuple[str, ...]]:
    """A field of where it lies."""

    def change(tensor: TensorProto) -> None:
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return first(change, *names)


def graph(change: Callable[[onnx.GraphProto], object], *names: str) -> tuple[Damage, tuple[str, ...]]:
    return edit_model(MODEL, lambda proto: change(proto.graph)), (MODEL, *names)


def planted(location: str) -> tuple[Damage, tuple[str, ...]]:
    """A location that exists: nothing but its name speaks against it."""
    damage, names = put("location", location)

    def both(folder: Path) -> None:
        shutil.copy(folder / DATA, folder.parent / "outside" / DATA)
        (folder / "inner").mkdir()
        shutil.copy(folder / DATA, folder / "inner" / DATA)
        damage(folder)

    return both, names


def replaced(old: bytes, new: bytes) -> tuple[Damage, tuple[str, ...]]:
    """Bytes of the file, of the same length, so that no field's length changes."""
    return (lambda p: (p / MODEL).write_bytes((p / MODEL).read_bytes().replace(old, new))), (MODEL,)


def deep(proto: onnx.ModelProto) -> None:
    """Subgraphs in subgraphs."""
    for _ in range(60):
        inner = helper.make_graph(list(proto.graph.node), "inner", [], list(proto.graph.output))
        del proto.graph.node[:]
        proto.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
        if proto.ByteSize() > 1_000_000:
            break


def crowded(folder: Path) -> None:
    """A graph of nodes of two bytes each, which protobuf makes 3 GB of."""
    (folder / MODEL).write_bytes(b"\x3a\x80\xda\xc4\x09" + b"\x0a\x00" * 10_000_000)


def many_inputs(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Concat", [proto.graph.input[0].name] * 20_000, ["all"], axis=0))


def as_socket(folder: Path) -> None:
    (folder / DATA).unlink()
    os.mknod(folder / DATA, 0o140644)


def not_finite(folder: Path) -> None:
    values = np.fromfile(folder / DATA, np.float32)
    values[5] = np.nan
    values.tofile(folder / DATA)


FAMILY = Family(
    base=base,
    command=("optimize", "{input}/model.onnx", "--output", "{out}"),
    cases=cases(
        {
            "in the parent": planted(f"../outside/{DATA}"),
            "there and back": planted(f"../input/{DATA}"),
            "through a folder": planted(f"inner/../../outside/{DATA}"),
            "/etc/passwd": put("location", "/etc/passwd"),
            "an absolute path": put("location", "/dev/zero"),
            "procfs": put("location", "/proc/self/mem"),
            "a home folder": put("location", "~/weights.bin"),
            "a URL": put("location", "file:///etc/passwd"),
            "a drive": put("location", "C:\\weights.bin"),
            "a share": put("location", "\\\\host\\share\\weights.bin"),
            "backslashes": put("location", "..\\outside\\weights.bin"),
            "NUL": put("location", f"{DATA}\0.txt"),
            "two lines": put("location", f"{DATA}\nerror: x"),
            "an escape sequence": put("location", "\x1b[2J"),
            "a megabyte": put("location", "a" * 10**6),
            "longer than names are": put("location", "\u00e9" * 200),
            "no name": put("location", ""),
            "the folder": put("location", "."),
            "the parent": put("location", ".."),
            "the model itself": put("location", MODEL),
            "no location": first(lambda t: t.external_data.pop(0)),
            "two locations": first(lambda t: t.external_data.add(key="location", value="/etc/passwd")),
            "a location that is not UTF-8": replaced(b"weights.bin", b"weights\xff\xfe\xfdn"),
            "a negative offset": put("offset", "-4096"),
            "an offset beyond the file": put("offset", str(1 << 20)),
            "an offset of 2**64": put("offset", str(2**64)),
            "an offset of 10**5000": put("offset", "9" * 5000),
            "an offset of NaN": put("offset", "nan"),
            "an offset in hexadecimal": put("offset", "0x10"),
            "an offset of other digits": put("offset", "\u0661\u0662"),
            "a length beyond the file": put("length", str(1 << 40)),
            "a length of zero": put("length", "0"),
            "a negative length": put("length", "-1"),
            "a length of one byte less": put("length", str(NBYTES - 1)),
            "a length with an exponent": put("length", "4e3"),
            "negative dims": first(lambda t: t.dims.__setitem__(0, -1)),
            "dims of 2**62": first(lambda t: t.dims.__setitem__(0, 2**62)),
            "dims that wrap": first(lambda t: t.dims.extend([2**32, 2**32])),
            "a hundred axes": first(lambda t: t.dims.extend([1] * 100)),
            "an unknown type": first(lambda t: setattr(t, "data_type", 99)),
            "a type of text": first(lambda t: setattr(t, "data_type", TensorProto.STRING)),
            "data in two places": first(lambda t: setattr(t, "raw_data", bytes(NBYTES))),
            "inline data too short": graph(lambda g: setattr(g.initializer[0], "raw_data", b"x"), "inline"),
            "inline data too long": graph(lambda g: setattr(g.initializer[0], "raw_data", bytes(5000)), "inline"),
            "inline data of a terabyte": graph(lambda g: g.initializer[0].dims.__setitem__(0, 2**38), "inline"),
            "a weight twice": graph(lambda g: g.initializer.append(external("first", 0)), "first"),
            "a link that leads out": (outside(DATA), (DATA,)),
            "a link to a device": (link(DATA, "/dev/zero"), (DATA,)),
            "a pipe": (pipe(DATA), (DATA,)),
            "a socket": (as_socket, (DATA,)),
            "a folder": (folder_instead(DATA), (DATA,)),
            "absent": (remove(DATA), (DATA,)),
            "cut": (cut(DATA, -1), (MODEL, DATA)),
            "not finite": (not_finite, ("first", "NaN")),
            "no model": (text(MODEL, b""), (MODEL,)),
            "text": (text(MODEL, "import os"), (MODEL,)),
            "zeros": (sparse(MODEL, 1 << 20), (MODEL,)),
            "two gigabytes of zeros": (sparse(MODEL, (1 << 31) - 2), (MODEL,)),
            "a terabyte of zeros": (sparse(MODEL, 1 << 40), (MODEL,)),
            "half of it": (lambda p: cut(MODEL, (p / MODEL).stat().st_size // 2)(p), (MODEL,)),
            "a model that is a pipe": (pipe(MODEL), (MODEL,)),
            "no graph": (edit_model(MODEL, lambda m: m.ClearField("graph")), (MODEL, "graph")),
            "no version": (edit_model(MODEL, lambda m: m.ClearField("ir_version")), (MODEL, "version")),
            "a version to come": (edit_model(MODEL, lambda m: setattr(m, "ir_version", 10**6)), (MODEL,)),
            "no operator sets": (edit_model(MODEL, lambda m: m.ClearField("opset_import")), (MODEL,)),
            "an operator that is unknown": graph(lambda g: setattr(g.node[0], "op_type", "Exec"), "Exec"),
            "a domain that is unknown": graph(lambda g: setattr(g.node[0], "domain", "evil"), "evil"),
            "an input that nothing gives": graph(lambda g: g.node[0].input.__setitem__(0, "gone"), "gone"),
            "a cycle": graph(lambda g: g.node[0].input.__setitem__(0, "y"), "y"),
            "a value given twice": graph(lambda g: g.node[1].output.__setitem__(0, "a"), "'a'"),
            "an output that nothing gives": graph(lambda g: setattr(g.output[0], "name", "gone"), "gone"),
            "a name of two lines": graph(lambda g: g.node[0].input.__setitem__(0, "a\nb")),
            "ten million nodes": (crowded, (MODEL, "600,000")),
            "a node of 20,000 inputs": (edit_model(MODEL, many_inputs), (MODEL, "Concat", "20,000")),
            "1.9 GB of a number and zeros": (
                lambda p: ((p / MODEL).write_bytes(b"\x08"), os.truncate(p / MODEL, 1_900_000_000)),
                (MODEL, "not an ONNX model"),
            ),
            "50 million packed integers": (
                lambda p: (p / MODEL).write_bytes(
                    b"\x3a\x8c\xe1\xeb\x17\x2a\x87\xe1\xeb\x17\x10\x07\x3a\x80\xe1\xeb\x17" + b"\x01" * 50_000_000
                ),
                (MODEL, "packed"),
            ),
            "nested graphs": (edit_model(MODEL, deep), (MODEL,)),
        }
    ),
)
