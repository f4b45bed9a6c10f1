"""Pickles that run something when a trusting reader loads them.

Modules and functions are those that public advisories about scanners (picklescan, fickling, modelscan) name as ways
past their lists; forms are the ways past their reading of opcodes. None is ever called here: a file that is refused
must not have imported, called or opened anything, and must be refused whatever it names.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

from tests.hostile.case import Damage, Family, cases
from tests.hostile.meta_base import FIRST, PTH, meta_checkpoint, pickled, storages, zipped
from tests.hostile.meta_base import pickle as valid
from tests.hostile.torch_files import (
    BUILD,
    DICT,
    EMPTY_TUPLE,
    MARK,
    NEWOBJ,
    NONE,
    PERSID,
    POP,
    PROTOCOL,
    REDUCE,
    SETITEM,
    STOP,
    TRUE,
    Entry,
    Tensor,
    archive,
    call,
    integer,
    name,
    state,
    text,
    torch_entries,
    tuple_of,
)

COMMAND = "touch canary"
# Command, code, import, file, network: one list, because an allowlist treats all alike.
GADGETS = Path(__file__).with_name("gadgets.txt").read_text().split()
SYSTEM = name("os", "system")
RUN = SYSTEM + text(COMMAND) + b"\x85" + REDUCE


def gadget(dotted: str) -> tuple[Damage, tuple[str, ...]]:
    """A call of a name before the state dict."""
    module, _, attribute = dotted.rpartition(".")
    return pickled(valid(call(name(module, attribute), text(COMMAND)) + POP)), (PTH, dotted)


def form(data: bytes, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return pickled(data), (PTH, *names)


def whole_file(data: bytes) -> tuple[Damage, tuple[str, ...]]:
    return (lambda folder: (folder / PTH).write_bytes(data)), (PTH,)


def entry(added: Entry) -> tuple[Damage, tuple[str, ...]]:
    """One entry more in the archive."""
    return zipped(lambda entries: [*entries, added]), (PTH, added.name.rpartition("/")[2])


class _Payload:
    """What most tutorials write."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        import os

        return os.system, (COMMAND,)


PLAIN = {protocol: pickle.dumps(_Payload(), protocol) for protocol in range(6)}
FORMS = {
    "REDUCE, the result popped": form(valid(RUN + POP), "os.system"),
    "REDUCE, the result in the state dict": form(valid(extra={"x": RUN}), "os.system"),
    "REDUCE after the state dict": form(valid(after=RUN + POP), "os.system"),
    "a name that is not called": form(valid(SYSTEM + POP), "os.system"),
    "STACK_GLOBAL": form(valid(text("os") + text("system") + b"\x93" + POP), "STACK_GLOBAL"),
    "STACK_GLOBAL from the memo": form(
        valid(text("os") + b"q\x00" + POP + text("system") + b"q\x01" + POP + b"h\x00h\x01\x93" + POP), "POP"
    ),
    "STACK_GLOBAL with decoys": form(valid(text("os") + text("x") + POP + text("system") + b"\x93"), "POP"),
    "INST": form(valid(MARK + text(COMMAND) + b"ios\nsystem\n" + POP), "INST"),
    "OBJ": form(valid(MARK + SYSTEM + text(COMMAND) + b"o" + POP), "os.system"),
    "OBJ of a name that is known": form(valid(MARK + name("collections", "OrderedDict") + b"o" + POP), "OBJ"),
    "NEWOBJ": form(valid(name("subprocess", "Popen") + tuple_of(text(COMMAND)) + NEWOBJ + POP), "subprocess.Popen"),
    "NEWOBJ of a storage": form(valid(name("torch", "FloatStorage") + EMPTY_TUPLE + NEWOBJ + POP), "class"),
    "NEWOBJ_EX": form(valid(name("torch", "FloatStorage") + EMPTY_TUPLE + DICT + b"\x92" + POP), "NEWOBJ_EX"),
    "EXT1": form(valid(b"\x82\x01" + POP), "EXT1"),
    "EXT2": form(valid(b"\x83\x01\x00" + POP), "EXT2"),
    "EXT4": form(valid(b"\x84\x01\x00\x00\x00" + POP), "EXT4"),
    "BUILD on the state dict": form(valid(after=DICT + text("__class__") + NONE + SETITEM + BUILD), "state"),
    "BUILD with __setstate__": form(valid(after=DICT + text("__setstate__") + SYSTEM + SETITEM + BUILD), "os.system"),
    "BUILD on a name": form(valid(name("torch", "FloatStorage") + DICT + BUILD + POP), "state"),
    "BUILD on a tuple": form(valid(EMPTY_TUPLE + DICT + BUILD + POP), "state"),
    "a call of a known name with a gadget": form(
        valid(call(name("collections", "OrderedDict"), RUN) + POP), "os.system"
    ),
    "a call of a storage": form(valid(call(name("torch", "FloatStorage"), integer(1)) + POP), "cannot be called"),
    "a call of a text": form(valid(call(text("os.system"), text(COMMAND)) + POP), "cannot be called"),
    "a call of the state dict": form(valid(after=EMPTY_TUPLE + REDUCE), "cannot be called"),
    "a hook of a tensor": form(
        state({FIRST: Tensor(tail=TRUE + call(name("collections", "OrderedDict"), tuple_of(RUN))).pickled()}),
        "os.system",
    ),
    "a parameter with a hook": form(
        state({FIRST: call(name("torch._utils", "_rebuild_parameter"), Tensor().pickled(), TRUE, RUN)}), "os.system"
    ),
    "a tensor with metadata": form(
        state({FIRST: Tensor(tail=TRUE + call(name("collections", "OrderedDict")) + DICT).pickled()}), "tensor"
    ),
    "a tensor of a subclass": form(
        valid(extra={"x": call(name("torch._tensor", "_rebuild_from_type_v2"), SYSTEM)}), "_rebuild_from_type_v2"
    ),
    "bytes by another codec": form(
        valid(extra={"x": call(name("_codecs", "encode"), text("x"), text("rot13"))}), "bytes"
    ),
    "a persistent id of a gadget": form(
        valid(tuple_of(text("storage"), SYSTEM, text("0")) + PERSID + POP), "os.system"
    ),
    "a persistent id of a module": form(
        valid(tuple_of(text("module"), text("0"), text("x.py"), text("import os"), integer(1)) + PERSID + POP),
        "storage",
    ),
    "a persistent id of text": form(valid(b"Pos.system\n" + POP), "PERSID"),
    "a name with a carriage return": form(valid(b"cos\r\nsystem\r\n" + POP), "os"),
    "a name with a space": form(valid(b"ctorch._utils _rebuild_tensor_v2\n\n" + POP), "_rebuild_tensor_v2"),
    "a name with a dot too many": form(
        valid(name("collections", "OrderedDict.fromkeys") + POP), "OrderedDict.fromkeys"
    ),
    "a name through a known module": form(valid(name("torch._utils", "os.system") + POP), "torch._utils.os.system"),
    "a name through a known class": form(
        valid(name("collections", "OrderedDict.__init__.__globals__") + POP), "__globals__"
    ),
    "a name of other letters": form(valid(name("\u043es", "system") + POP), "named"),
    "a name of full-width letters": form(valid(name("\uff4fs", "system") + POP), "named"),
    "a name of control characters": form(valid(name("\x1b[2J", "x") + POP), "named"),
    "a name without an end": form(valid(b"c" + b"a" * 5000), "does not end"),
    "an empty name": form(valid(b"c\n\n" + POP), "named"),
    "a pickle in bytes": form(valid(extra={"x": b"B" + struct.pack("<I", 40) + PLAIN[3][:40].ljust(40)}), "BINBYTES"),
    "a second pickle": form(valid() + PLAIN[2], "after the pickle's end"),
    "the end before the end": form(PLAIN[2] + valid()[2:]),
    "a frame": form(b"\x80\x04\x95" + struct.pack("<Q", len(valid())) + valid()[2:]),
    "a buffer": form(valid(b"\x97" + POP), "NEXT_BUFFER"),
    "a call, then something broken": form(valid(RUN)[:60], "os.system"),
    "a known name, then a gadget under its number": form(
        valid(name("collections", "OrderedDict") + b"q\x05" + POP + SYSTEM + b"q\x05" + POP), "POP"
    ),
    "a gadget as a key": form(valid()[:-2] + SYSTEM + NONE + b"u" + STOP, "os.system"),
    **{f"a reduced object of protocol {p}": form(data) for p, data in PLAIN.items()},
    "a file that is one pickle": whole_file(PLAIN[2]),
    "a file that is one pickle of protocol 0": whole_file(PLAIN[0]),
    "torch's old format": whole_file(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + PLAIN[2]),
    "torch's oldest format, a tar": whole_file(b"pickle".ljust(257, b"\0") + b"ustar\x0000" + bytes(500)),
    "an archive of 7-Zip": whole_file(b"7z\xbc\xaf\x27\x1c" + PLAIN[2]),
    "a pickle before the archive": whole_file(PLAIN[2] + archive(torch_entries(valid(), storages()))),
    "a pickle after the archive": whole_file(archive(torch_entries(valid(), storages()), after=PLAIN[2])),
    "a pickle beside the state dict": entry(Entry("archive/hidden.pkl", PLAIN[2])),
    "a pickle of another ending": entry(Entry("archive/config.p", PLAIN[2])),
    "a pickle of constants": entry(Entry("archive/constants.pkl", PLAIN[2])),
    "a TorchScript program": entry(Entry("archive/code/__torch__.py", b"import os")),
    "a second state dict": entry(Entry("archive/data.pkl", PLAIN[2])),
    "a state dict in another folder": entry(Entry("other/data.pkl", PLAIN[2])),
    "a state dict in capitals": entry(Entry("archive/DATA.PKL", PLAIN[2])),
    "a state dict up a folder": entry(Entry("archive/../archive/data.pkl", PLAIN[2])),
    "only a state dict": (
        lambda folder: (folder / PTH).write_bytes(archive([Entry("archive/data.pkl", PROTOCOL + RUN + STOP)])),
        (PTH,),
    ),
}


def other_file(folder: Path) -> None:
    """A second file that Meta's code would load."""
    (folder / "consolidated.01.pth").write_bytes(archive(torch_entries(PLAIN[2], {})))


FAMILY = Family(
    base=meta_checkpoint,
    cases=cases(
        {
            **{dotted: gadget(dotted) for dotted in GADGETS[::8]},  # test_gadgets.py has them all
            **FORMS,
            "in another file": (other_file, ("consolidated.01.pth",)),
        }
    ),
)
