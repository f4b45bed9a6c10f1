"""Artifacts that were changed after they were written: ``verify`` ends with 4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from tests.hostile.bases import artifact
from tests.hostile.case import Case, Damage, Family, cases
from tests.hostile.files import (
    SINGLE,
    cut,
    edit_json,
    edit_model,
    folder_instead,
    link,
    pipe,
    read_raw,
    remove,
    text,
    write_raw,
)

MANIFEST, MODEL = "l4convert.json", "model.onnx"


def flip(file: str, place: int) -> Callable[[Path], None]:
    """One bit of a file; a negative place is counted from the end."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[place] ^= 1
        (folder / file).write_bytes(content)

    return damage


def elsewhere(folder: Path) -> None:
    """Other weights behind a link, as an artifact has that shares its weights."""
    flip(SINGLE, -1)(folder)
    (folder / SINGLE).rename(folder.parent / "work" / SINGLE)
    (folder / SINGLE).symlink_to(f"../work/{SINGLE}")


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json(MANIFEST, change)


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        fields, data = read_raw(folder / SINGLE)
        change(fields)
        write_raw(folder / SINGLE, json.dumps(fields).encode(), data)

    return damage


def external(key: str, value: str) -> tuple[Damage, tuple[str, ...]]:
    """Where the first external tensor of the graph is."""

    def change(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return edit_model(MODEL, change), (MODEL, "refer")


def first_tensor(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return manifest(lambda content: change(next(iter(content["tensors"].values()))))


FAMILY = Family(
    base=artifact,
    command=("verify", "{input}"),
    exit_code=4,
    cases={
        **cases(
            {
                "a bit of a weight": (flip(SINGLE, -1), (SINGLE, "tensor", "SHA-256")),
                "a bit of the header": (flip(SINGLE, 9), (SINGLE,)),
                "a bit of the header's length": (flip(SINGLE, 0), (SINGLE,)),
                "a bit of the graph": (flip(MODEL, 40), (MODEL,)),
                "the last bit of the graph": (flip(MODEL, -1), (MODEL,)),
                "a bit of the tokenizer": (flip("tokenizer.json", 50), ("tokenizer.json", "SHA-256")),
                "a bit of the template": (flip("chat_template.jinja", 3), ("chat_template.jinja", "SHA-256")),
                "a byte less of the weights": (cut(SINGLE, -1), (SINGLE,)),
                "no weights": (remove(SINGLE), (SINGLE, "missing")),
                "empty weights": (cut(SINGLE, 0), (SINGLE,)),
                "no graph": (remove(MODEL), (MODEL, "missing")),
                "an empty graph": (cut(MODEL, 0), (MODEL,)),
                "another graph": (text(MODEL, b"\x08\x0a"), (MODEL,)),
                "no tokenizer": (remove("tokenizer.json"), ("tokenizer.json", "missing")),
                "a file more": (text("model.py", "import os"), ("model.py", "not in the manifest")),
                "a folder more": (lambda p: (p / "extra").mkdir(), ("extra",)),
                "a link for a file": (link("extra", "../outside/secret"), ("extra",)),
                "a pipe for the graph": (pipe(MODEL), (MODEL,)),
                "a folder for the weights": (folder_instead(SINGLE), (SINGLE,)),
                "a device for the weights": (link(SINGLE, "/dev/zero"), (SINGLE,)),
                "a link to nothing": (link("tokenizer.json", "gone"), ("tokenizer.json",)),
                "a terabyte of zeros": (
                    lambda p: cut(SINGLE, (p / SINGLE).stat().st_size + (1 << 40))(p),
                    (SINGLE,),
                ),
                "external data elsewhere": external("location", "../outside/secret"),
                "external data at an absolute path": external("location", "/etc/passwd"),
                "external data in another file": external("location", "tokenizer.json"),
                "external data beyond the end": external("offset", str(1 << 50)),
                "external data at a negative offset": external("offset", "-4096"),
                "external data one byte on": external("offset", "4097"),
                "external data of another length": external("length", "1"),
                "external data of no number": external("length", "1e9"),
                "a tensor renamed in the file": (
                    header(lambda h: h.update({"x": h.pop(next(n for n in h if n != "__metadata__"))})),
                    (SINGLE, "x"),
                ),
                "a tensor's dtype in the file": (
                    header(lambda h: next(e for n, e in h.items() if n != "__metadata__").update(dtype="I64")),
                    (SINGLE,),
                ),
                "a digest in the manifest": (first_tensor(lambda t: t.update(sha256="0" * 64)), (MANIFEST,)),
                "a shape in the manifest": (first_tensor(lambda t: t.update(shape=[1])), (MANIFEST,)),
                "a shape of 10**30": (first_tensor(lambda t: t.update(shape=[10**30])), (MANIFEST,)),
                "a shape of NaN": (first_tensor(lambda t: t.update(shape=[float("nan")])), (MANIFEST,)),
                "a dtype in the manifest": (first_tensor(lambda t: t.update(dtype="STRING")), (MANIFEST,)),
                "a key in the manifest": (first_tensor(lambda t: t.update(key=["x"])), (MANIFEST,)),
                "no tensors in the manifest": (manifest(lambda m: m.pop("tensors")), (MANIFEST, "tensors")),
                "no files in the manifest": (manifest(lambda m: m.pop("files")), (MANIFEST, "files")),
                "tensors is a list": (manifest(lambda m: m.update(tensors=[])), (MANIFEST, "tensors")),
                "files out of the folder": (
                    manifest(lambda m: m["files"].update({"../outside/secret": {"bytes": 1, "sha256": "x"}})),
                    (MANIFEST, "outside"),
                ),
                "an absolute file": (
                    manifest(lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "x"}})),
                    (MANIFEST, "/etc/passwd"),
                ),
                "an entry of a number": (manifest(lambda m: m["files"].update({MODEL: 1})), (MANIFEST, MODEL)),
                "the manifest without its digest": (manifest(lambda m: m.pop("sha256")), (MANIFEST,)),
                "engines of a number": (manifest(lambda m: m.update(engines=7)), (MANIFEST,)),
                "an engine out of the folder": (
                    manifest(lambda m: m.update(engines=[{"path": "../../outside/secret", "bytes": 1, "sha256": "x"}])),
                    (MANIFEST,),
                ),
                "weights elsewhere, and changed": (elsewhere, (SINGLE, "SHA-256")),
                "recipe changed": (manifest(lambda m: m.update(recipe="fp8")), (MANIFEST,)),
                "a space in the manifest": (
                    lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes() + b" "),
                    (MANIFEST, "changed"),
                ),
            }
        ),
        "a manifest of another schema": Case(manifest(lambda m: m.update(schema="x/1")), (MANIFEST, "schema"), 3),
        "a manifest that is not JSON": Case(text(MANIFEST, "{"), (MANIFEST, "not valid JSON"), 3),
        "a manifest nested too deeply": Case(text(MANIFEST, '{"a":' * 100_000), (MANIFEST, "nested"), 3),
        "a manifest of a list": Case(text(MANIFEST, "[]"), (MANIFEST, "object"), 3),
        "no manifest": Case(remove(MANIFEST), (MANIFEST,), 3),
        "a key twice in the manifest": Case(
            text(MANIFEST, '{"schema": "l4convert.manifest/1", "schema": ""}'), (MANIFEST, "twice"), 3
        ),
    },
)
