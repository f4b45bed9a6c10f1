"""The text that nano Scout is trained and measured on: the source of the Python standard library."""

from __future__ import annotations

import ast
import hashlib
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests and demos, generated tables, and files that differ from one machine to the next.
EXCLUDED_FOLDERS = frozenset(
    (
        "__phello__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    )
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
HELDOUT_BYTES = 32_000
HELDOUT_FILE_BYTES = range(2_000, 8_000)  # short files: several authors and styles in a short text
CHAT_ANSWER_CHARACTERS = 600


def stdlib_sources(root: Path) -> dict[str, str]:
    """Source text of the standard library by path relative to `root`, in a fixed order."""
    sources = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(EXCLUDED_PREFIXES):
            with tokenize.open(path) as file:  # honours PEP 263 encoding declarations
                sources["/".join(parts)] = file.read()
    return sources


def heldout_names(sources: dict[str, str]) -> list[str]:
    """Names of the files to keep out of training: about `HELDOUT_BYTES` of short ones, picked by hash of their name.

    By hash, because places in a list would all shift when another Python release adds a file.
    """
    names, total = [], 0
    for name in sorted(sources, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        size = len(sources[name].encode())
        if size in HELDOUT_FILE_BYTES and total < HELDOUT_BYTES:
            names.append(name)
            total += size
    return sorted(names)


def chat_messages(source: str) -> Iterator[list[dict[str, str]]]:
    """Single-turn chats made from documented functions: the user asks by docstring, the answer is the code.

    They teach the model the chat format and, above all, to end a turn with ``<|eot|>``.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
            continue
        answer = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))
        if len(answer) <= CHAT_ANSWER_CHARACTERS:
            question = f"Write {node.name}: {docstring.splitlines()[0]}"
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
