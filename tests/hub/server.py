"""A stand-in for the Hugging Face Hub on loopback: what huggingface_hub asks of it, answered as the hub answers.

One server plays the hub (``/api``, ``/org/name/resolve/...``), another one on its own port, so another origin, the
storage to which the hub redirects requests for large files. Both count what they send, and can be told to fail.

After the requests and expectations in huggingface_hub's source (hf_api.py, file_download.py, utils/_http.py) and the
hub's public documentation.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    """One that came: to ``hub`` or ``storage``."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0

    @property
    def range(self) -> tuple[int, int] | None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None


# Given a request and what answers it, may answer itself: True where it did.
Fault = Callable[[Request, "Answer"], bool]


@dataclass
class Hub:
    """What the two servers serve, and what they were asked.

    Attributes:
        repo: ``org/name``.
        folder: Its files.
        redirect: Whether large files are on the storage's server.
        lfs: How the names of large files end.
        token: What the hub wants to see; None: everybody may read.
        xet: Whether answers say that files are in Xet.
        faults: Asked in turn about every request.
    """

    repo: str
    folder: Path
    commit: str = COMMIT
    refs: dict[str, str] = field(default_factory=dict)
    redirect: bool = True
    lfs: tuple[str, ...] = (".safetensors", ".pth", ".pt")
    token: str | None = None
    gated: bool = False
    xet: bool = False
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    listed: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda files: files
    endpoint: str = ""
    storage: str = ""

    @property
    def sent(self) -> int:
        """Bytes of bodies that answered requests for ranges."""
        return sum(request.sent for request in self.requests if request.range)

    def asked(self, part: str) -> list[Request]:
        return [request for request in self.requests if part in request.path]

    def etag(self, name: str) -> str:
        status = (self.folder / name).stat()
        return _etag(self.folder / name, name.endswith(self.lfs), status.st_mtime_ns, status.st_size)

    def files(self) -> list[dict[str, Any]]:
        """Siblings of ``/api/models/.../revision/...?blobs=true``."""
        rows = []
        for path in sorted(self.folder.iterdir()):
            row: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": "b" * 40}
            if path.name.endswith(self.lfs):
                row["lfs"] = {"size": row["size"], "sha256": self.etag(path.name), "pointerSize": 134}
            else:
                row["blobId"] = self.etag(path.name)
            rows.append(row)
        return self.listed(rows)


@lru_cache(maxsize=64)
def _etag(path: Path, large: bool, _modified: int, _size: int) -> str:
    data = path.read_bytes()
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Answer:
    """How a request is answered; what a fault has in its hands."""

    def __init__(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        self.handler = handler
        self.request = request

    def send(
        self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int | None = None
    ) -> None:
        self.handler.send_response(status)
        for name, value in (headers or {}).items():
            self.handler.send_header(name, value)
        if not {"Content-Length", "Transfer-Encoding"} & (headers or {}).keys():
            self.handler.send_header("Content-Length", str(len(body) if length is None else length))
        self.handler.end_headers()
        if self.request.method != "HEAD":
            self.request.sent += len(body)
            self.handler.wfile.write(body)

    def json(self, value: Any) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def error(self, status: int, code: str, message: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": message})

    def reset(self) -> None:
        """Break the connection off, as a machine that dies does."""
        self.handler.wfile.flush()
        connection = self.handler.connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        self.handler.close_connection = True


def _answer_hub(hub: Hub, request: Request, answer: Answer) -> None:
    path, authorization = unquote(urlsplit(request.path).path), request.headers.get("Authorization")
    revision = rf"(?P<revision>{'|'.join(['main', hub.commit, *map(re.escape, hub.refs)])})"
    resolved = re.fullmatch(f"/{hub.repo}/resolve/{revision}/(?P<name>.+)", path)
    info = re.fullmatch(f"/api/models/{hub.repo}(?:/revision/{revision})?", path)
    if authorization != f"Bearer {hub.token}" and (hub.gated or hub.token):
        code = ("GatedRepo", "Access to model is restricted") if hub.gated else ("RepoNotFound", "Not found")
        answer.error(403 if authorization else 401, *code)
    elif f"/{hub.repo}" not in path:
        answer.error(404, "RepoNotFound", "Repository not found")
    elif info:
        rows = hub.files() if "blobs" in parse_qs(urlsplit(request.path).query) else []
        answer.json({"id": hub.repo, "sha": hub.refs.get(info["revision"], hub.commit), "siblings": rows})
    elif re.fullmatch(f"/api/models/{hub.repo}/tree/{revision}", path):
        answer.json([_tree_row(row) for row in hub.files()])
    elif resolved is None:
        answer.error(404, "RevisionNotFound", "Invalid rev id")
    elif not (hub.folder / resolved["name"]).is_file():
        answer.error(404, "EntryNotFound", "Entry not found")
    else:
        _resolve(hub, request, answer, resolved["name"])


def _tree_row(row: dict[str, Any]) -> dict[str, Any]:
    lfs = {"oid": row["lfs"]["sha256"], "size": row["size"], "pointerSize": 134} if "lfs" in row else None
    return {"type": "file", "path": row["rfilename"], "size": row["size"], "oid": row["blobId"], "lfs": lfs}


def _resolve(hub: Hub, request: Request, answer: Answer, name: str) -> None:
    path, etag = hub.folder / name, hub.etag(name)
    headers = {"X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
    if not name.endswith(hub.lfs):
        return send_file(request, answer, path, {**headers, "ETag": f'"{etag}"'})
    headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(path.stat().st_size)}
    if hub.xet:
        headers |= {"X-Xet-Hash": hashlib.sha256(etag.encode()).hexdigest()}
        headers |= {"X-Xet-Refresh-Route": f"/api/models/{hub.repo}/xet-read-token/{hub.commit}"}
    if hub.redirect:
        return answer.send(302, {**headers, "Location": f"{hub.storage}/{name}?signature=secret"})
    return send_file(request, answer, path, {**headers, "ETag": f'"{etag}"'})


def _answer_storage(hub: Hub, request: Request, answer: Answer) -> None:
    name = urlsplit(request.path).path.removeprefix("/")
    if "signature=secret" not in request.path:
        return answer.send(403)
    return send_file(request, answer, hub.folder / name, {"ETag": '"storage-' + hub.etag(name)[:8] + '"'})


def send_file(request: Request, answer: Answer, path: Path, headers: dict[str, str]) -> None:
    """All of it, or the range that was asked for."""
    size = path.stat().st_size
    if request.range is None:
        answer.send(200, headers, path.read_bytes())
    elif request.range[0] >= size:
        answer.send(416, {"Content-Range": f"bytes */{size}"})
    else:
        start, stop = request.range[0], min(request.range[1], size)
        content_range = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        answer.send(206, headers | content_range, read_part(path, start, stop))


def read_part(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve while the context lasts; sets ``endpoint`` and ``storage``."""
    roles = {"hub": _answer_hub, "storage": _answer_storage}
    servers = {role: _start(hub, role, answer) for role, answer in roles.items()}
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{servers[role].server_port}" for role in ("hub", "storage"))
    try:
        yield hub
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()


def _start(hub: Hub, role: str, answer: Callable[[Hub, Request, Answer], None]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            request = Request(
                role, self.command, self.path, {name.title(): value for name, value in self.headers.items()}
            )
            hub.requests.append(request)
            how = Answer(self, request)
            try:
                if not any(fault(request, how) for fault in tuple(hub.faults)):
                    answer(hub, request, how)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def first(times: int, applies: Callable[[Request], bool], how: Callable[[Request, Answer], None]) -> Fault:
    """A fault that happens to the first requests of a kind."""
    left = [times]
    lock = threading.Lock()

    def fault(request: Request, answer: Answer) -> bool:
        with lock:
            if not left[0] or not applies(request):
                return False
            left[0] -= 1
        how(request, answer)
        return True

    return fault


def ranged(request: Request) -> bool:
    """Whether it asks for part of a file."""
    return request.range is not None


def stall(seconds: float) -> Callable[[Request, Answer], None]:
    """Say nothing for a while."""

    def how(_: Request, answer: Answer) -> None:
        time.sleep(seconds)
        answer.reset()

    return how
