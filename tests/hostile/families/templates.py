"""Chat templates and the small files that carry them: copied into artifacts, run by clients, never by this tool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.bases import checkpoint
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import cut, edit_json, folder_instead, link, pipe, sparse, text

JINJA, OLD, CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"

# Server-side template injections, by the way in which they get from a value to Python's objects.
INJECTIONS = {
    "a subclass": "{{ ''.__class__.__mro__[1].__subclasses__()[132]('touch canary', shell=True) }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "builtins": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch canary') }}",
    "by subscript": "{{ messages['__class__']['__base__'] }}",
    "by the attr filter": "{{ messages|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "by attr and a request": "{{ messages | attr(tools[0]) }}",
    "by attr and a format": "{{ messages|attr('%c%cclass%c%c'|format(95,95,95,95)) }}",
    "by escapes": "{{ messages['\\u005f\\u005fclass\\u005f\\u005f'] }}",
    "by octal escapes": "{{ messages['\\137\\137class\\137\\137'] }}",
    "by joining": "{{ messages[['_'*2,'class','_'*2]|join] }}{{ messages|map(attribute='__class__')|list }}",
    "in a statement": "{% set x = messages.__class__ %}",
    "in a comment's shadow": "{# #}{{ x.__reduce_ex__(4) }}",
    "an import": "{% import 'os' as os %}",
    "an import from": "{% from '/etc/passwd' import x %}",
    "an include": "{% include '/etc/passwd' %}",
    "an extension": "{%- extends '../../secret' -%}",
}


def in_config(template: Any) -> Callable[[Path], None]:
    return edit_json(CONFIG, lambda config: config.update(chat_template=template))


def injections() -> dict[str, tuple[Damage, tuple[str, ...]]]:
    """Each in one of the three places by turns."""
    found: dict[str, tuple[Damage, tuple[str, ...]]] = {}
    for number, (name, template) in enumerate(INJECTIONS.items()):
        place = (JINJA, CONFIG, OLD)[number % 3]
        damages = {
            JINJA: text(JINJA, template),
            CONFIG: in_config(template),
            OLD: text(OLD, json.dumps({"chat_template": template})),
        }
        found[f"{name}, in {place}"] = (damages[place], (place, "template"))
    return found


FAMILY = Family(
    base=checkpoint,
    cases=cases(
        {
            **injections(),
            "in one of several templates": (
                in_config(
                    [{"name": "default", "template": "x"}, {"name": "tool_use", "template": INJECTIONS["builtins"]}]
                ),
                (CONFIG, "chat_template"),
            ),
            "not UTF-8": (text(JINJA, b"\xff\xfe{{ x }}"), (JINJA, "UTF-8")),
            "control characters": (text(JINJA, "{{ x }}\x1b]0;title\x07\x00"), (JINJA, "template")),
            "a terabyte": (sparse(JINJA, 1 << 40), (JINJA, "bytes")),
            "two megabytes": (text(JINJA, b"x" * 2_000_000), (JINJA, "bytes")),
            "two megabytes in JSON": (in_config("x" * 2_000_000), (CONFIG, "template")),
            "a number": (in_config(3), (CONFIG, "chat_template")),
            "a list of numbers": (in_config([1, 2]), (CONFIG, "chat_template")),
            "a folder": (folder_instead(JINJA), (JINJA,)),
            "a pipe": (pipe(JINJA), (JINJA,)),
            "a device": (link(JINJA, "/dev/zero"), (JINJA,)),
            "its JSON is no object": (text(CONFIG, "[]"), (CONFIG, "object")),
            "its JSON is cut": (cut(CONFIG, 20), (CONFIG, "not valid JSON")),
            "its JSON is nested": (text(CONFIG, '{"a":' * 100_000), (CONFIG, "nested too deeply")),
            "its JSON has a key twice": (
                text(CONFIG, '{"chat_template": "a", "chat_template": "b"}'),
                (CONFIG, "chat_template", "twice"),
            ),
            "the old file is no object": (text(OLD, '"{{ x }}"'), (OLD, "object")),
            "the old file is not JSON": (text(OLD, "{{ x }}"), (OLD, "not valid JSON")),
            "the generation settings are a list": (text("generation_config.json", "[1]"), ("generation_config.json",)),
            "the generation settings are huge": (
                sparse("generation_config.json", 1 << 36),
                ("generation_config.json",),
            ),
            "the special tokens are huge": (sparse("special_tokens_map.json", 1 << 36), ("special_tokens_map.json",)),
            "the special tokens are no object": (text("special_tokens_map.json", "null"), ("special_tokens_map.json",)),
        }
    ),
)
