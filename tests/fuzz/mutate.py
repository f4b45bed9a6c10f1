"""Mutations of JSON that keep it JSON: most random changes of bytes would only test the JSON reader."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 127, 128, 255, 4096, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64,
    10**30, 0.0, 0.5, 1.0, -0.5, 1e-45, 1e308, math.nan, math.inf, -math.inf, "", "0", "a", "null", "../x",
    "/etc/passwd",
    "\0", "\n", "\x1b[2J", "\ud800", "re:.*", "re:(a+)+$", "x" * 300, [], {}, [[]], [None], [0, 0], {"": 0}, [1] * 40,
)  # fmt: skip

Slot = tuple[Any, Any]


def mutate_json(mutate: Callable[[bytes, int], bytes], data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's mutation, or one of a value in the JSON that ``data`` is.

    Args:
        mutate: libFuzzer's own.
        data: The input.
        max_size: Of the result, in bytes.
        seed: libFuzzer's, so that a run can be repeated.
    """
    chance = random.Random(seed)
    # What comes before the JSON (a selector) is left alone.
    start = data.find(b"{")
    if start < 0 or chance.random() < 0.3:
        return mutate(data, max_size)
    try:
        value = json.loads(data[start:].decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return mutate(data, max_size)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _change(value, chance)
    changed = data[:start] + json.dumps(value).encode("utf-8", "surrogatepass")
    return changed if len(changed) <= max_size else mutate(data, max_size)


def _change(value: Any, chance: random.Random) -> None:
    """Replace, remove, rename, copy or nudge one value in place."""
    slots: list[Slot] = []
    _collect(value, slots, 0)
    if not slots:
        if isinstance(value, dict):
            value["x"] = copy.deepcopy(chance.choice(VALUES))
        return
    holder, key = chance.choice(slots)
    action = chance.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        _, name = chance.choice(slots)
        holder[name if isinstance(name, str) else "x"] = holder.pop(key)
    elif action == 2:
        source, name = chance.choice(slots)
        holder[key] = copy.deepcopy(source[name])
    elif action == 3 and type(holder[key]) is int:
        holder[key] += chance.choice((-1, 1, 64, -64, 2**32, -(2**32)))
    elif action == 4 and isinstance(holder[key], list) and holder[key]:
        holder[key] = holder[key] * 2
    elif action == 5 and isinstance(holder[key], str):
        text = holder[key]
        place = chance.randrange(len(text) + 1)
        holder[key] = text[:place] + chance.choice(("", "../", "\n", "\0", ".", "*", "0")) + text[place + 1 :]
    else:
        holder[key] = copy.deepcopy(chance.choice(VALUES))


def _collect(value: Any, slots: list[Slot], depth: int) -> None:
    """Every place of a value in an object or array."""
    if depth > 50 or len(slots) > 2000:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        slots.append((value, key))
        _collect(inner, slots, depth + 1)
