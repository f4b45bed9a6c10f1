"""The pickle of a state dict: what torch writes is read, every other program is refused and none of it runs."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l4convert.checkpoint.state_names import NAMES, PickledStorage, PickledTensor, Skipped
from l4convert.checkpoint.state_pickle import MAX_STEPS, read_state
from l4convert.errors import InputError
from tests.checkpoint.refusals import assert_refused

CANARY = "l4convert-was-attacked"


def saved(value: Any, tmp_path: Path) -> bytes:
    torch.save(value, tmp_path / "x.pth")
    return zipfile.ZipFile(tmp_path / "x.pth").read("x/data.pkl")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value)) + value.encode()


def program(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def entry(value: bytes, key: str = "w") -> bytes:
    return program(b"}", text(key), value, b"s")


def test_tensors_are_described_as_torch_knows_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(a=base, b=base[1:3], c=torch.nn.Parameter(base.to(torch.bfloat16).T))
    state["d"] = base.to(torch.float8_e4m3fn)
    found = read_state(saved(state, tmp_path), "f")
    whole = PickledStorage("0", ir.DataType.FLOAT, 24)
    assert found["a"] == PickledTensor(whole, ir.DataType.FLOAT, 0, (4, 6), (6, 1))
    assert found["b"] == PickledTensor(whole, ir.DataType.FLOAT, 6, (2, 6), (6, 1))
    assert (found["c"].dtype, found["c"].shape, found["c"].strides) == (ir.DataType.BFLOAT16, (6, 4), (1, 6))
    assert found["d"].storage == PickledStorage("2", None, 24)
    assert found["d"].dtype == ir.DataType.FLOAT8E4M3FN


def test_what_else_metas_files_hold_is_skipped_not_made(tmp_path: Path) -> None:
    values = {
        "io": io.BytesIO(b"\xff" * 5000),
        "empty": io.BytesIO(),
        "bytes": b"abc",
        "none": None,
        "n": -1,
        "big": 2**40,
    }
    found = read_state(saved(values, tmp_path), "f")
    assert found["io"] == found["empty"] == Skipped("_io BytesIO")
    assert found["bytes"] == Skipped("bytes")
    assert (found["none"], found["n"], found["big"]) == (None, -1, 2**40)


def test_the_versions_beside_a_modules_state_dict_are_left_out(tmp_path: Path) -> None:
    assert list(read_state(saved(torch.nn.Linear(2, 3).state_dict(), tmp_path), "f")) == ["weight", "bias"]


class Gadget:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def gadget(function: Any, *args: Any, protocol: int = 2) -> bytes:
    return pickle.dumps({"w": Gadget(function, args)}, protocol)


class Setter:
    def __reduce__(self) -> Any:
        return (OrderedDict, (), {"__class__": 1, "items": 2})


ATTRIBUTE = (CANARY, b"R")
NAMED = """
os:system posix:system nt:system subprocess:Popen builtins:eval __builtin__:eval builtins:exec builtins:getattr
__builtin__:apply builtins:__import__ importlib:import_module runpy:_run_code pty:spawn
code:InteractiveInterpreter timeit:timeit cProfile:run pdb:run bdb:Bdb pydoc:pipepager
asyncio.unix_events:_UnixSubprocessTransport._start ctypes:CDLL operator:attrgetter operator:methodcaller
functools:partial types:FunctionType marshal:loads pickle:loads _pickle:loads dill:loads joblib:load
webbrowser:open socket:create_connection urllib.request:urlopen http.client:HTTPSConnection shutil:rmtree
linecache:getline io:open _io:FileIO _io:open codecs:open _codecs:decode codecs:encode
numpy.core.multiarray:_reconstruct numpy.testing:runstring torch:load torch.storage:_load_from_bytes
torch.hub:load torch.jit:load torch.serialization:load torch._utils:_rebuild_sparse_tensor
torch._utils:_rebuild_qtensor torch._utils:_rebuild_wrapper_subclass
torch._utils:_rebuild_device_tensor_from_numpy torch._tensor:_rebuild_from_type_v2 torch:Tensor torch:Size
torch:storage.UntypedStorage torch._utils:_rebuild_tensor_v2.__globals__ collections:OrderedDict.__init__
collections:deque transformers:AutoModel llama_models:x copyreg:_reconstructor site:main
"""
BY_NAME = [tuple(pair.split(":")) for pair in NAMED.split()]
ODD = [("torch.FloatStorage", ""), ("", "torch FloatStorage"), ("collections", "OrderedDict "), ("collections\t", "x")]


@pytest.mark.parametrize("pair", [*BY_NAME, *ODD], ids=".".join)
def test_names_that_no_state_dict_needs_are_refused_before_anything_is_done(pair: tuple[str, str]) -> None:
    for data in (entry(name(*pair)), entry(name(*pair) + text(f"touch {CANARY}") + b"\x85R")):
        shown = pair if pair in BY_NAME else ()
        assert_refused(lambda data=data: read_state(data, "f.pth"), ["f.pth", "is named", *shown])


@pytest.mark.parametrize("function", [eval, exec, print, getattr, __import__, open, compile])
@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused_in_every_protocol(function: Any, protocol: int, tmp_path: Path) -> None:
    data = gadget(function, f"open({str(tmp_path / CANARY)!r}, 'w')", protocol=protocol)
    assert_refused(lambda: read_state(data, "f.pth"), ["f.pth"])
    assert not (tmp_path / CANARY).exists()


def persistent(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"tQ"


WORD, KIND, KEY, PLACE, SIZE = text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x04"

OTHERS = {
    "inst": b"(" + text("id") + b"ios\nsystem\n",
    "obj": b"(" + name("os", "system") + text("id") + b"o",
    "obj of an allowed class": b"(" + name("_io", "BytesIO") + b"o",
    "stack_global": text("os") + text("system") + b"\x93",
    "stack_global of an allowed name": text("collections") + text("OrderedDict") + b"\x93",
    "ext1": b"\x82\x01",
    "ext2": b"\x83\x01\x00",
    "ext4": b"\x84\x01\x00\x00\x00",
    "newobj_ex": name("_io", "BytesIO") + b")}\x92",
    "newobj of a function": name("_codecs", "encode") + b")\x81",
    "newobj of a storage": name("torch", "FloatStorage") + b")\x81",
    "newobj with arguments": name("_io", "BytesIO") + b"K\x01\x85\x81",
    "newobj of a value": b"K\x01)\x81",
    "reduce of a class": name("_io", "BytesIO") + b")R",
    "reduce of a storage": name("torch", "FloatStorage") + b")R",
    "reduce of a dtype": name("torch", "float8_e4m3fn") + b")R",
    "reduce of a text": text("eval") + b")R",
    "reduce with a dictionary": name("collections", "OrderedDict") + b"}R",
    "an OrderedDict of arguments": name("collections", "OrderedDict") + b"}\x85R",
    "encode to another codec": name("_codecs", "encode") + text("x") + text("zip") + b"\x86R",
    "encode of a number": name("_codecs", "encode") + b"K\x01" + text("latin1") + b"\x86R",
    "bytes of a number": name("__builtin__", "bytes") + b"K\x09\x85R",
    "build on a number": b"K\x01}b",
    "build on a name": name("collections", "OrderedDict") + b"}b",
    "build on a storage": name("torch", "FloatStorage") + b"}b",
    "build of a method": b"}}" + text("__setstate__") + text("x") + b"sb",
    "build of slots": b"}N}\x86b",
    "build of a text": b"}" + text("x") + b"b",
    "persid in text": b"Pstorage\n",
    "persistent id that is a text": text("storage") + b"Q",
    "persistent id of four": persistent(WORD, KIND, KEY, PLACE),
    "persistent id of six": persistent(WORD, KIND, KEY, PLACE, SIZE, SIZE),
    "persistent id of a module": persistent(text("module"), KIND, KEY, PLACE, SIZE),
    "persistent id without a storage": persistent(WORD, text("FloatStorage"), KEY, PLACE, SIZE),
    "persistent id of a dtype": persistent(WORD, name("torch", "float8_e4m3fn"), KEY, PLACE, SIZE),
    "persistent id with a negative size": persistent(WORD, KIND, KEY, PLACE, b"J\xff\xff\xff\xff"),
    "persistent id whose size is true": persistent(WORD, KIND, KEY, PLACE, b"\x88"),
    "persistent id whose key is a number": persistent(WORD, KIND, b"K\0", PLACE, SIZE),
    "persistent id whose place is none": persistent(WORD, KIND, KEY, b"N", SIZE),
    "a list": b"]",
    "a set": b"\x8f",
    "a frozenset": b"(\x91",
    "an integer in text": b"I1\n",
    "a long in text": b"L1L\n",
    "a float": b"G" + b"\0" * 8,
    "a float in text": b"F1.0\n",
    "a string": b"S'x'\n",
    "a unicode line": b"Vx\n",
    "bytes": b"C\x01x",
    "short string": b"U\x01x",
    "short unicode": b"\x8c\x01x",
    "long4": b"\x8b\x01\x00\x00\x00\x01",
    "a huge integer": b"\x8a\xff" + b"\xff" * 255,
    "dup": b"K\x012",
    "pop": b"K\x010",
    "pop_mark": b"(K\x011",
    "a frame": b"\x95" + b"\x04" + b"\0" * 7 + b"K\x01",
    "memoize": b"K\x01\x94",
    "a number from the memo that is not there": b"h\x09",
    "a buffer": b"\x97",
    "a second protocol": b"\x80\x02K\x01",
    "an unknown opcode": b"\xff",
    "a mark that is not there": b"t",
    "a value that is not there": b"\x87",
    "a mark instead of a value": b"(\x85",
    "a text that is not UTF-8": b"X\x02\x00\x00\x00\xff\xfe",
    "a text longer than the file": b"X\xff\xff\xff\xff",
    "a name without an end": b"c" + b"o" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_opcodes_and_arguments_that_no_state_dict_needs_are_refused(kind: str) -> None:
    assert_refused(lambda: read_state(entry(OTHERS[kind]), "f.pth: entry 'x/data.pkl'"), ["f.pth: entry 'x/data.pkl'"])


STORAGE = persistent(WORD, KIND, KEY, PLACE, SIZE)
V2, V3 = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_tensor_v3")


def tensor(
    offset: bytes = b"K\0", shape: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", rest: bytes = b"\x89"
) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    return V2 + b"(" + STORAGE + offset + shape + stride + rest + hooks + b"tR"


TENSORS = {
    "a negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
    "an offset that is true": tensor(offset=b"\x88"),
    "a negative size": tensor(shape=b"J\xff\xff\xff\xff\x85"),
    "a negative stride": tensor(stride=b"J\xff\xff\xff\xff\x85"),
    "sizes that are a number": tensor(shape=b"K\x04"),
    "sizes that are a dictionary": tensor(shape=b"}"),
    "more strides than sizes": tensor(stride=b"K\x01K\x01\x86"),
    "nine axes": tensor(shape=b"(" + b"K\x01" * 9 + b"t", stride=b"(" + b"K\x01" * 9 + b"t"),
    "a storage that is a text": tensor().replace(STORAGE, text("storage")),
    "hooks": tensor(rest=b"\x89}" + text("a") + b"K\x01s0").replace(b"0c", b"c"),
    "requires_grad that is a number": tensor(rest=b"K\x01"),
    "metadata": tensor().removesuffix(b"tR") + b"}tR",
    "a parameter of a number": name("torch._utils", "_rebuild_parameter") + b"K\x01\x88}\x87R",
    "a parameter without hooks": name("torch._utils", "_rebuild_parameter") + tensor() + b"\x88\x86R",
    "untyped without a type": tensor().replace(V2, V3),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_malformed_tensors_are_refused(kind: str) -> None:
    assert_refused(lambda: read_state(entry(TENSORS[kind]), "f.pth"), ["f.pth"])
    assert isinstance(read_state(entry(tensor()), "f")["w"], PickledTensor)


WHOLE = {
    "nothing": b"",
    "no protocol": b"}.",
    "protocol 4": pickle.dumps({}, 4),
    "no end": b"\x80\x02}",
    "an end too many": program(b"}") + b".",
    "two values": program(b"}}"),
    "a number": program(b"K\x01"),
    "nothing on the stack": program(),
    "a tensor alone": program(tensor()),
    "a key that is a number": program(b"}K\x01K\x01s"),
    "a key that is a tuple": program(b"}))s"),
    "a key of a megabyte": program(b"}" + text("a" * 1_000_000) + b"K\x01s"),
    "a key twice": program(b"}" + (text("a") + b"K\x01s") * 2),
    "half a pair": program(b"}(" + text("a") + b"u"),
    "entries of a tuple": program(b")" + text("a") + b"K\x01s"),
    "itself": program(b"}q\0" + text("a") + b"h\0sh\0"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_pickles_that_are_no_state_dict_are_refused(kind: str) -> None:
    assert_refused(lambda: read_state(WHOLE[kind], "f.pth"), ["f.pth"])


BOMBS = {
    "tuples in tuples": b")" + b"\x85" * 10**6,
    "doubling by the memo": b")" + b"q\0h\0\x86" * 10**6,
    "dictionaries": b"}" * 10**6,
    "marks": b"(" * 10**6,
    "memo": b")" + b"".join(b"r" + struct.pack("<L", n) for n in range(10**5 * 3)),
    "dictionaries in dictionaries": b"}" + (text("a") + b"}") * 10**5 + b"s" * 10**5,
    "names": name("collections", "OrderedDict") * 10**5 * 3,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_end_soon(kind: str) -> None:
    data = program(BOMBS[kind])
    error = assert_refused(lambda: read_state(data, "f.pth"), ["f.pth"])
    assert "opcodes" in error.message or len(data) < 4 * MAX_STEPS


def test_only_the_names_of_the_table_are_known() -> None:
    """Whoever adds a name must think about what calling it can do."""
    assert {row.text for row in NAMES.values() if row.kind in ("function", "class")} == {
        "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter", "_io BytesIO", "_codecs encode", "__builtin__ bytes",
    }  # fmt: skip


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_random_bytes_are_refused_or_read(data: bytes) -> None:
    with pytest.raises(InputError):
        read_state(b"\x80\x02" + data + b"\0", "f")
