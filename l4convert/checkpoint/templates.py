"""Small files that are copied into artifacts: what a checkpoint may bring along, and what a chat template may hold.

This tool executes no template. Clients do, most of them in Jinja's sandbox
(https://jinja.palletsprojects.com/en/stable/sandbox/), some of them not. An artifact should not carry further what only
an attack needs, so a template that reaches for Python's internals or for other files is refused: names with two
underscores, however they are spelled, the ``attr`` filter, and statements that load templates. This is a second line of
defence and no proof of anything: a client must still use the sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import json_type, parse_object, read_bytes, require_file, show
from l4convert.errors import InputError

TEMPLATE_BYTES = 1 << 20  # Llama 4's own has 5 kB
SMALL_BYTES = 64 << 20
TOKENIZER_BYTES = 256 << 20  # Llama 4's own has 27 MB
HINT = "no chat template needs this; take the template of the original model"

JSON_SIDECARS = frozenset(
    {"generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.json"}
)
_TEMPLATE = "chat_template.jinja"
_LIMITS: Mapping[str, int] = {
    _TEMPLATE: TEMPLATE_BYTES,
    "chat_template.json": 2 * TEMPLATE_BYTES,
    "tokenizer.json": TOKENIZER_BYTES,
    "tokenizer.model": TOKENIZER_BYTES,
}

# Escapes in Jinja's strings by which an underscore (0x5F, octal 137) can be written.
_ESCAPED = re.compile(r"\\(?:x5f|u005f|U0000005f|N\{low line\}|137)", re.IGNORECASE)
_FORBIDDEN = (
    (re.compile(r"__"), "has a name with two underscores"),
    (re.compile(r"\|\s*attr\b"), "uses the filter `attr`"),
    (re.compile(r"\{%[-+]?\s*(?:import|from|include|extends)\b"), "loads another template"),
)
_PRINTABLE = {"\n", "\r", "\t"}


def check_sidecar(path: Path) -> None:
    """Check a file that will be copied, as far as this tool can judge it.

    Raises:
        InputError: It is no file, is too large, is not the JSON object that it should be, or holds a template that is
            refused.
    """
    limit = _LIMITS.get(path.name, SMALL_BYTES)
    size = require_file(path)
    where = show(path)
    if size > limit:
        raise InputError(f"{where}: {size:,} bytes, more than the {limit:,} that such a file can sensibly have")
    if path.name == _TEMPLATE:
        check_template(_text(read_bytes(path, limit), where), f"{where}: the template")
    elif path.name in JSON_SIDECARS:
        for key, template in _templates(parse_object(read_bytes(path, limit), where), where):
            check_template(template, f"{where}: {key}, a template,")


def check_template(template: str, what: str) -> None:
    """Refuse a chat template that no honest model has.

    Args:
        template: Jinja.
        what: Begins the message, such as "tokenizer_config.json: chat_template".

    Raises:
        InputError: It is too long, or holds control characters or one of the means of an attack.
    """
    if len(template) > TEMPLATE_BYTES:
        raise InputError(f"{what} has {len(template):,} characters, more than the {TEMPLATE_BYTES:,} that are allowed")
    if control := next((c for c in template if c < " " and c not in _PRINTABLE), None):
        raise InputError(f"{what} has a control character, {control!r}")
    text = _ESCAPED.sub("_", template)
    for pattern, fault in _FORBIDDEN:
        if found := pattern.search(text):
            raise InputError(f"{what} {fault} (at character {found.start():,})", HINT)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text (byte {error.start})") from error


def _templates(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """The chat templates of a JSON file with their keys: text, or a list of objects with ``name`` and ``template``."""
    value = content.get("chat_template")
    if value is None:
        return
    if isinstance(value, str):
        yield "chat_template", value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            template = item.get("template") if isinstance(item, dict) else None
            if not isinstance(template, str):
                raise InputError(f"{where}: chat_template[{index}] is not an object with a template")
            yield f"chat_template[{index}]", template
    else:
        raise InputError(f"{where}: chat_template is {json_type(value)}, not text or a list")
