"""Files of Meta's format: params.json, tokenizer.model, and the archive, pickle and storages of a .pth."""

from __future__ import annotations

import base64
import json

from l4convert.checkpoint.meta_params import read_params
from l4convert.checkpoint.pth_file import open_pth
from l4convert.checkpoint.state_pickle import read_state
from l4convert.checkpoint.tiktoken_model import read_ranks
from l4convert.checkpoint.zip_directory import read_directory
from tests.fuzz.target import OneFile, Target
from tests.hostile.meta_base import PARAMS
from tests.hostile.torch_files import Tensor, archive, call, name, state, text, torch_entries

READ_BYTES = 1 << 16
_params, _pth, _zip, _ranks = (OneFile(n) for n in ("params.json", "consolidated.00.pth", "x.pth", "tokenizer.model"))
_OPCODES = (b"\x80\x02", b"}", b"(", b"u.", b"R", b"Q", b"q\x00", b"h\x00", b"\x85", b"\x86", b"\x87", b"t", b"X", b"K")
_NAMES = ("torch._utils\n_rebuild_tensor_v2\n", "collections\nOrderedDict\n", "torch\nHalfStorage\n", "os\nsystem\n")


def pickles() -> list[bytes]:
    """State dicts in all the forms that the reader knows."""
    tensor = Tensor(text("0"), (2, 3)).pickled()
    ordered = call(name("collections", "OrderedDict"))
    parameter = call(name("torch._utils", "_rebuild_parameter"), tensor, b"\x88", ordered)
    encoded = call(name("_codecs", "encode"), text("x"), text("latin1"))
    state_of_bytes = name("_io", "BytesIO") + b")\x81" + encoded + b"K\x00N\x87b"
    metadata = b"}" + text("_metadata") + ordered + b"sb"
    return [
        state({"a": tensor, "b": parameter}), state({"a": tensor}, after=metadata),
        state({"x._extra_state": state_of_bytes}),
        state({"a": Tensor(text("1"), (3, 2), (1, 3), kind="BFloat16Storage").pickled(), "n": b"N"}), b"\x80\x02}.",
    ]  # fmt: skip


def archives() -> list[bytes]:
    """Those pickles with their storages."""
    return [archive(torch_entries(data, {"0": bytes(12), "1": bytes(12)})) for data in pickles()]


def parse_pth(data: bytes) -> None:
    """A whole file, and every tensor in it."""
    for tensor in open_pth(_pth(data)).tensors.values():
        if tensor.nbytes < READ_BYTES:
            assert len(tensor.tobytes()) == tensor.nbytes


def parse_zip(data: bytes) -> None:
    """A directory, whose entries must lie in the file without touching each other."""
    with _zip(data).open("rb") as file:
        end = 0
        for entry in read_directory(file, len(data), "x.pth").values():
            assert end < entry.offset <= entry.offset + entry.size <= len(data)
            end = entry.offset + entry.size


def parse_within(data: bytes) -> None:
    """A pickle in an archive that is well-formed, so that mutations of it alone reach the storages."""
    parse_pth(archive(torch_entries(data, {"0": bytes(12), "1": bytes(12)})))


PARAMS_JSON = Target(
    lambda data: read_params(_params(data), 64),
    lambda: [json.dumps(PARAMS).encode(), json.dumps({"model": {**PARAMS, "vocab_size": -1}}).encode()],
    (*(f'"{key}"' for key in PARAMS), "NaN", "Infinity", "1e999", "null"),
    form="json",
)


def ranks() -> list[bytes]:
    """All bytes, without and with tokens that are made of them."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc", b"\xff\xfe"]
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    return [b"".join(lines[:256]), b"".join(lines), b"YQ== 0\nYg== 1\n"]


RANKS = Target(lambda data: read_ranks(_ranks(data)), ranks, ("YQ== ", " 0\n", "\n"))
PICKLE = Target(lambda data: read_state(data, "data.pkl"), pickles, (*_OPCODES, *_NAMES))
STORAGES = Target(parse_within, pickles, (*_OPCODES, *_NAMES), longest=4096)
ZIP = Target(
    parse_zip,
    archives,
    (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"),
    longest=4096,
)
PTH = Target(parse_pth, archives, (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", *_OPCODES, *_NAMES), longest=4096)
