"""What the Hugging Face Hub answers: the list of a repository's files, where a file is, and a range of its bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from l4convert.checkpoint.fields import Fields
from l4convert.checkpoint.hub import faults, ranges
from l4convert.checkpoint.hub.address import Address
from l4convert.checkpoint.hub.listing import list_files
from l4convert.checkpoint.remote import RemoteFile
from l4convert.checkpoint.text import parse_object
from tests.fuzz.target import Target

SIZE, ETAG, COMMIT = 64, "a" * 64, "0123456789abcdef0123456789abcdef01234567"
_answers: dict[str, Fields] = {}


@functools.cache
def _prepare() -> None:
    """Answer requests from the input, without a network and without waiting between tries."""
    import httpx2
    import huggingface_hub

    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(_answer)))
    for module in (faults, ranges):
        module.ask_again = lambda failures, wait, stopped: False  # type: ignore[attr-defined]


def _answer(request: Any) -> Any:
    import httpx2

    kind = "list" if "/api/" in str(request.url) else "find" if request.method == "HEAD" else "read"
    fields = _answers[kind]
    status = fields.values.get("status")
    headers = fields.values.get("headers")
    pairs = headers.items() if isinstance(headers, dict) else ()
    body = fields.values.get("body")
    text = body if isinstance(body, str) else json.dumps(body)
    return httpx2.Response(
        status if type(status) is int and 100 <= status < 600 else 200,
        headers=[(name, value) for name, value in pairs if isinstance(value, str) and _plain(name) and _plain(value)],
        content=iter([text.encode("utf-8", "replace")]),  # as it comes from a connection: not yet read
        request=request,
    )


def _plain(text: str) -> bool:
    """What can be in a header at all: a real client gets nothing else from its connection."""
    return bool(text) and text.isascii() and text.isprintable()


def parse(data: bytes) -> None:
    """What is asked for is the first of the three that the input has an answer to."""
    _prepare()
    content = Fields(parse_object(data, "answers"), "answers")
    for kind in ("list", "find", "read"):
        _answers[kind] = content.object(kind) or Fields({}, "answers")
    if content.has("list"):
        list_files(Address("org/name"))
        return
    url = f"https://huggingface.co/org/name/resolve/{COMMIT}/x.safetensors"
    file = RemoteFile(Path("x.safetensors"), "hf://org/name/x.safetensors", url, SIZE, ETAG, ETAG)
    ranges._places.clear()
    if not content.has("find"):
        ranges._places[file] = ranges._Place(url="https://cdn.example/x")
    ranges.read_range(file, 8, memoryview(bytearray(16)))


def seeds() -> list[bytes]:
    """Answers as the hub gives them, with and without a redirect."""
    files = [
        {"rfilename": "config.json", "size": 10, "blobId": "b" * 40},
        {
            "rfilename": "x.safetensors",
            "size": SIZE,
            "blobId": "c" * 40,
            "lfs": {"size": SIZE, "sha256": ETAG, "pointerSize": 1},
        },
    ]
    listed = {
        "status": 200,
        "headers": {"Content-Type": "application/json"},
        "body": {"id": "org/name", "sha": COMMIT, "siblings": files},
    }
    found = {"X-Repo-Commit": COMMIT, "ETag": f'"{ETAG}"', "Content-Length": str(SIZE)}
    linked = {
        **found,
        "X-Linked-Etag": f'"{ETAG}"',
        "X-Linked-Size": str(SIZE),
        "Location": "https://cdn.example/x?sig=1",
    }
    sent = {"Content-Range": f"bytes 8-23/{SIZE}", "ETag": f'"{ETAG}"'}
    read = {"status": 206, "headers": sent, "body": "0123456789abcdef"}
    limited = {"status": 429, "headers": {"Retry-After": "3"}}
    refused = {"status": 401, "headers": {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"}}
    answers: list[dict[str, Any]] = [
        {"list": listed},
        {"list": refused},
        {"find": {"status": 200, "headers": found}, "read": read},
        {"find": {"status": 302, "headers": linked}, "read": read},
        {"find": limited},
        {"read": read},
        {"read": {**read, "status": 302, "headers": {"Location": "https://elsewhere.example/x"}}},
    ]
    return [json.dumps(answer).encode() for answer in answers]


WORDS = (
    "Content-Range",
    "X-Linked-Etag",
    "X-Linked-Size",
    "Location",
    "Retry-After",
    "RateLimit",
    "file:///etc/passwd",
    "bytes ",
)
HUB = Target(parse, seeds, WORDS, form="json")
