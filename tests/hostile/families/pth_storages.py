"""State dicts whose tensors are not where, or not what, they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.hostile.case import Damage, Family, cases
from tests.hostile.meta_base import FIRST, NORM, PTH, meta_checkpoint, pickled, tensor, tensors, zipped
from tests.hostile.meta_base import pickle as valid
from tests.hostile.torch_files import (
    DICT,
    MARK,
    NONE,
    POP,
    PROTOCOL,
    SETITEM,
    STOP,
    TUPLE,
    Entry,
    changed,
    integer,
    name,
    state,
    text,
)


def having(**values: Any) -> tuple[Damage, tuple[str, ...]]:
    return tensor(lambda one: replace(one, **values)), (PTH, FIRST)


def raw(data: bytes, *names: str) -> tuple[Damage, tuple[str, ...]]:
    return pickled(data), (PTH, *names)


def data(change: bytes) -> tuple[Damage, tuple[str, ...]]:
    """The bytes of the first storage."""
    return zipped(lambda entries: changed(entries, "data/0", data=change)), (PTH, FIRST)


ENTRIES = {key: value.pickled() for key, value in tensors().items()}
FAMILY = Family(
    base=meta_checkpoint,
    real=False,
    cases=cases(
        {
            "a storage that is missing": having(key=text("999")),
            "a storage's name leads out": having(key=text("../../../outside/secret")),
            "a storage's name is absolute": having(key=text("/etc/passwd")),
            "a storage's name is the pickle": having(key=text("../data.pkl")),
            "a storage's name is empty": having(key=text("")),
            "a storage's name of two lines": having(key=text("0\n1")),
            "a storage's name is a number": having(key=integer(0)),
            "a storage's name is a tuple": having(key=integer(0) + b"\x85"),
            "a storage that is too small": having(size=10),
            "a storage that is too large": having(size=4096),
            "a storage of no elements": having(size=0),
            "a storage of -1 elements": having(size=-1),
            "a storage of 2**62 elements": having(size=2**62),
            "a storage of another type": having(kind="FloatStorage"),
            "a storage of complex numbers": having(kind="ComplexFloatStorage"),
            "a storage of an unknown type": having(kind="HolyStorage"),
            "an untyped storage": having(kind="UntypedStorage"),
            "a storage of integers": having(kind="ShortStorage"),
            "not a storage": having(word="module"),
            "a negative offset": having(offset=-2),
            "an offset beyond the storage": having(offset=2048),
            "an offset of one": having(offset=1),
            "an offset of 2**62": having(offset=2**62),
            "negative sizes": having(shape=(-64, -32)),
            "sizes of 2**31": having(shape=(2**31, 2**31), size=2048),
            "sizes that wrap": having(shape=(2**32, 2**32, 32), size=2048),
            "a size of zero": having(shape=(0, 32), size=2048),
            "one row more": having(shape=(65, 32), size=2048),
            "sizes the other way round": having(shape=(32, 64)),
            "no sizes": having(shape=(), size=2048),
            "nine axes": having(shape=(64, 32, 1, 1, 1, 1, 1, 1, 1)),
            "a thousand axes": having(shape=(64, 32) + (1,) * 998),
            "negative strides": having(strides=(32, -1)),
            "strides of zero": having(strides=(0, 0)),
            "strides that overlap": having(strides=(1, 1)),
            "strides beyond the storage": having(strides=(64, 1)),
            "strides of 2**62": having(strides=(2**62, 1)),
            "strides with gaps": having(strides=(16, 2)),
            "fewer strides than sizes": having(strides=(1,)),
            "a dtype for a storage": having(kind="float8_e4m3fn"),
            "a tensor of no arguments": raw(
                state({**ENTRIES, FIRST: name("torch._utils", "_rebuild_tensor_v2") + b")R"})
            ),
            "a tensor that is None": raw(state({**ENTRIES, FIRST: NONE}), FIRST),
            "a tensor that is a number": raw(state({**ENTRIES, FIRST: integer(7)}), FIRST),
            "a tensor that is a text": raw(state({**ENTRIES, FIRST: text("x" * 5000)}), FIRST),
            "a tensor that is a dictionary": raw(state({**ENTRIES, FIRST: DICT}), FIRST),
            "a tensor that is missing": raw(state({k: v for k, v in ENTRIES.items() if k != NORM}), NORM, "missing"),
            "a tensor too many": raw(valid(extra={"extra.weight": ENTRIES[NORM]}), "extra.weight"),
            "a tensor twice": raw(
                PROTOCOL + DICT + text("a") + NONE + SETITEM + text("a") + NONE + SETITEM + STOP, "'a'", "twice"
            ),
            "a key that is a number": raw(PROTOCOL + DICT + integer(1) + NONE + SETITEM + STOP, "key"),
            "a key that is endless": raw(PROTOCOL + DICT + text("x" * 100_000) + NONE + SETITEM + STOP, "key"),
            "not a dictionary": raw(PROTOCOL + integer(1) + STOP, "dictionary"),
            "two values": raw(PROTOCOL + DICT + DICT + STOP, "dictionary"),
            "no value": raw(PROTOCOL + STOP, "dictionary"),
            "no end": raw(valid()[:-1], "cut off"),
            "empty": raw(b""),
            "half of it": raw(valid()[: len(valid()) // 2]),
            "a text longer than the pickle": raw(PROTOCOL + b"X\xff\xff\xff\xff", "cut off"),
            "a text that is not UTF-8": raw(PROTOCOL + b"X\x01\x00\x00\x00\xff" + STOP, "UTF-8"),
            "an integer of 255 bytes": raw(PROTOCOL + b"\x8a\xff" + b"\x01" * 255, "integer"),
            "an integer of 2 GB": raw(PROTOCOL + b"\x8b\xff\xff\xff\x7f", "LONG4"),
            "bytes of 2**60": raw(PROTOCOL + b"\x8e" + b"\0\0\0\0\0\0\0\x10", "BINBYTES8"),
            "a byte array of 2**60": raw(PROTOCOL + b"\x96" + b"\0\0\0\0\0\0\0\x10", "BYTEARRAY8"),
            "nothing on the stack": raw(PROTOCOL + TUPLE + STOP, "stack"),
            "a number that nothing was kept under": raw(PROTOCOL + b"h\x07" + STOP, "number 7"),
            "a memo of 2**32": raw(PROTOCOL + b"N" + b"r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff" + STOP),
            "a million marks": raw(PROTOCOL + MARK * 1_000_000 + STOP, "opcodes"),
            "a million nested tuples": raw(PROTOCOL + NONE + b"\x85" * 1_000_000 + STOP, "opcodes"),
            "100,000 nested tuples": raw(PROTOCOL + NONE + b"\x85" * 100_000 + STOP, "dictionary"),
            "100,000 nested tuples as a state": raw(valid(after=NONE + b"\x85" * 100_000 + b"b"), "state"),
            "nested tuples for a persistent id": raw(PROTOCOL + NONE + b"\x85" * 100_000 + b"Q" + STOP, "persistent"),
            "doubled 60 times": raw(PROTOCOL + NONE + b"q\x00h\x00\x86" * 60 + STOP, "dictionary"),
            "70 MB": raw(PROTOCOL + NONE * 70_000_000, "bytes"),
            "a popped value": raw(valid(NONE + POP), "POP"),
            "storages cut": data(b"\0" * 100),
            "no storages": (zipped(lambda e: [x for x in e if "/data/" not in x.name]), (PTH, FIRST)),
            "a storage more of a name that leads out": (
                zipped(lambda e: [*e, Entry("archive/data/../../x", b"0")]),
                (PTH, "../"),
            ),
            "big-endian": (zipped(lambda e: changed(e, "byteorder", data=b"big")), (PTH, "byte order")),
            "a version that is not known": (zipped(lambda e: changed(e, "version", data=b"99")), (PTH, "version")),
            "a version that is no number": (zipped(lambda e: changed(e, "version", data=b"x")), (PTH, "version")),
            "a version of 10,000 digits": (
                zipped(lambda e: changed(e, "version", data=b"9" * 10_000)),
                (PTH, "version"),
            ),
            "no version": (zipped(lambda e: [x for x in e if not x.name.endswith("version")]), (PTH, "version")),
        }
    ),
)
