"""An index that does not agree with the shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.bases import sharded
from tests.hostile.case import Family, cases
from tests.hostile.files import (
    EMBED,
    FIRST,
    HEAD,
    INDEX,
    NORM,
    SECOND,
    cut,
    edit_json,
    read_arrays,
    remove,
    sparse,
    text,
    write_safetensors,
)


def weight_map(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return edit_json(INDEX, lambda index: change(index["weight_map"]))


def tensors(file: str, change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Change what a shard holds; the index stays."""

    def damage(folder: Path) -> None:
        arrays = read_arrays(folder / file)
        change(arrays)
        write_safetensors(folder / file, arrays)

    return damage


def other(folder: Path, name: str) -> str:
    """The shard that does not hold a tensor."""
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    return SECOND if shard == FIRST else FIRST


FAMILY = Family(
    base=sharded,
    cases=cases(
        {
            "a tensor not listed": (weight_map(lambda m: m.pop(NORM)), (NORM, "not listed", INDEX)),
            "all but one not listed": (
                weight_map(lambda m: [m.pop(name) for name in list(m) if name not in {EMBED, NORM}]),
                ("not listed", INDEX),
            ),
            "listed in the other shard": (
                lambda p: weight_map(lambda m: m.update({NORM: other(p, NORM)}))(p),
                (NORM, "is missing", INDEX),
            ),
            "listed and in no shard": (weight_map(lambda m: m.update({"x.weight": FIRST})), ("x.weight", "is missing")),
            "a shard that is absent": (
                weight_map(lambda m: m.update({NORM: "model-3.safetensors"})),
                ("model-3", "absent"),
            ),
            "10,000 shards that are absent": (
                weight_map(lambda m: m.update({f"t{i}": f"s{i}.safetensors" for i in range(10_000)})),
                ("s0.safetensors", "absent", "9999 more"),
            ),
            "a shard is listed under another spelling": (
                weight_map(lambda m: m.update({NORM: FIRST.upper()})),
                (FIRST.upper(), "absent"),
            ),
            "the index itself as a shard": (weight_map(lambda m: m.update({NORM: INDEX})), (INDEX,)),
            "config.json as a shard": (weight_map(lambda m: m.update({NORM: "config.json"})), ("config.json",)),
            "every tensor in one shard": (
                weight_map(lambda m: m.update(dict.fromkeys(m, FIRST))),
                (FIRST, "is missing", INDEX),
            ),
            "a tensor in two shards": (
                lambda p: [tensors(s, lambda t: t.update({NORM: np.ones(32, np.float16)}))(p) for s in (FIRST, SECOND)],
                (NORM, "also in"),
            ),
            "a tensor more in a shard": (
                tensors(FIRST, lambda t: t.update({"x": np.ones(2, np.float16)})),
                (FIRST, "'x'", "not listed"),
            ),
            "a tensor less in a shard": (
                tensors(FIRST, lambda t: t.pop(EMBED, t.pop(HEAD))),
                (FIRST, HEAD, "is missing"),
            ),
            "no tensor in a shard": (tensors(SECOND, lambda t: t.clear()), (SECOND, "is missing")),
            "no shards but an index": (lambda p: (remove(FIRST)(p), remove(SECOND)(p)), (FIRST, "absent")),
            "shards but no index": (remove(INDEX), (INDEX,)),
            "a foreign tensor, listed": (
                lambda p: (
                    tensors(FIRST, lambda t: t.update({"x": np.ones(2, np.float16)}))(p),
                    weight_map(lambda m: m.update(x=FIRST))(p),
                ),
                (FIRST, "'x'", "not one this config has"),
            ),
            "no map": (text(INDEX, '{"metadata": {}}'), (INDEX, "weight_map")),
            "an empty map": (text(INDEX, '{"weight_map": {}}'), (INDEX, "weight_map")),
            "the map is a list": (text(INDEX, '{"weight_map": [["a", "b"]]}'), (INDEX, "weight_map")),
            "the map is text": (text(INDEX, '{"weight_map": "model.safetensors"}'), (INDEX, "weight_map")),
            "the map is null": (text(INDEX, '{"weight_map": null}'), (INDEX, "weight_map")),
            "not JSON": (text(INDEX, "weight_map:\n  a: b\n"), (INDEX, "not valid JSON")),
            "empty": (text(INDEX, ""), (INDEX, "not valid JSON")),
            "cut": (cut(INDEX, 100), (INDEX, "not valid JSON")),
            "nested too deeply": (text(INDEX, '{"weight_map":' * 100_000), (INDEX, "nested too deeply")),
            "a tensor twice": (
                text(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
                (INDEX, "'a'", "twice"),
            ),
            "a map twice": (
                text(INDEX, '{"weight_map": {}, "weight_map": {"a": "b"}}'),
                (INDEX, "weight_map", "twice"),
            ),
            "a terabyte of zeros": (sparse(INDEX, 1 << 40), (INDEX, "bytes")),
            "99 MB of zeros": (sparse(INDEX, 99_000_000), (INDEX, "not valid JSON")),
            "60 MB of empty lists": (
                text(INDEX, b'{"weight_map": [' + b"[]," * 20_000_000 + b"[]]}"),
                (INDEX,),
            ),
            "the file is a number": (weight_map(lambda m: m.update({NORM: 1})), (INDEX, NORM)),
            "the file is an object": (weight_map(lambda m: m.update({NORM: {"file": FIRST}})), (INDEX, NORM)),
        }
    ),
)
