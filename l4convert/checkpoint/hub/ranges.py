"""Reading ranges of files on a server that speaks the Hugging Face Hub's protocol.

A file's address (``/org/name/resolve/commit/file``) answers a ``HEAD`` request with what the file is
(``X-Linked-Etag``, ``X-Linked-Size``) and, for large ones, where its bytes are: a signed address at a storage provider,
which soon expires. ``huggingface_hub`` asks; what it learns is kept until the storage refuses, and the user's token
never goes there.
A range is asked for until all of it has come. Every answer must say that it is exactly what was asked for
(``Content-Range``), of a file that has the size and the identity that were listed.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from l4convert.checkpoint.hub.faults import RETRIED_STATUS, Fault, ask_again, explain, reason, retried_errors, wait_for
from l4convert.checkpoint.remote import RemoteFile
from l4convert.checkpoint.text import show
from l4convert.checkpoint.traffic import TRAFFIC
from l4convert.errors import RemoteError

if TYPE_CHECKING:
    import httpx2

_REDIRECTS = 5
# How often the hub is asked for another address because the storage refused the one that it gave.
_REFUSALS = 2
# A connection that gives less than this before it fails counts as one that gave nothing.
_PROGRESS_BYTES = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_PORTS = {"http": 80, "https": 443}


@dataclass
class _Place:
    """Where the bytes of a file are, and the ETag that they have there."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str | None = None
    etag: str | None = None

    def located(self, file: RemoteFile) -> str:
        """The address, from the hub unless it is known."""
        with self.lock:  # one asks, the others wait
            if self.url is None:
                self.url = _locate(file)
            return self.url

    def same(self, etag: str) -> bool:
        """Whether all answers from there had this ETag."""
        with self.lock:
            self.etag = self.etag or etag
            return self.etag == etag

    def forget(self, url: str) -> None:
        """Let the hub be asked again, unless it was since this address was used."""
        with self.lock:
            if self.url == url:
                self.url = self.etag = None


@dataclass(frozen=True)
class _Urls:
    """The address that the hub gave, and the one that answered after redirects."""

    first: str
    last: str


_places: dict[RemoteFile, _Place] = {}
_places_lock = threading.Lock()


def read_range(file: RemoteFile, start: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with the file's bytes from ``start`` on; see :func:`receive`."""

    def take(position: int, data: bytes) -> None:
        buffer[position - start : position - start + len(data)] = data

    receive(file, start, start + len(buffer), take)


def receive(
    file: RemoteFile,
    start: int,
    stop: int,
    take: Callable[[int, bytes], None],
    stopped: threading.Event | None = None,
) -> None:
    """Get the file's bytes from ``start`` to before ``stop``.

    Args:
        file: The file.
        start: Offset of the first byte.
        stop: Offset after the last one, at most the file's size.
        take: Called with an offset in the file and the bytes that are there, in order, each byte once.
        stopped: When set, this ends soon with an error.

    Raises:
        RemoteError: The server cannot be reached, refuses, or does not send what it was asked for.
    """
    position = failed_at = start
    failures = 0  # one after the other
    while position < stop:
        try:
            for data in _body(file, position, stop):
                take(position, data)
                position += len(data)
                if stopped is not None and stopped.is_set():
                    raise RemoteError(f"{file.name}: reading it was stopped")
        except Fault as fault:
            failures = 1 if position - failed_at >= _PROGRESS_BYTES else failures + 1
            failed_at = position
            if failures > fault.most or not ask_again(failures, fault.wait, stopped):
                where = f"bytes {start:,} to {stop:,}"
                raise RemoteError(f"{file.name}: {where} cannot be read: {fault}", fault.hint) from fault
            TRAFFIC.retried()


def _body(file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
    """What one request gives of a range: all of it, or less and then a fault."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    place = _place(file)
    first = url = place.located(file)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        for _ in range(_REDIRECTS):
            headers = {**_headers(file, url), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            request = get_session().build_request("GET", url, headers=headers, timeout=timeout)
            with closing(get_session().send(request, stream=True, follow_redirects=False)) as response:
                TRAFFIC.requested()
                if response.has_redirect_location:
                    url = _redirected(file, url, response.headers["Location"])
                    continue
                _check(file, place, _Urls(first, url), response, (start, stop))
                yield from _pieces(response, stop - start)
                return
        raise Fault(f"more than {_REDIRECTS} redirects", most=0)
    except retried_errors() as error:
        raise Fault(reason(error)) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise Fault(reason(error), most=0) from error


def _pieces(response: httpx2.Response, nbytes: int) -> Iterator[bytes]:
    """The body, which must have so many bytes."""
    left = nbytes
    for data in response.iter_raw():
        TRAFFIC.received(len(data))
        left -= len(data)
        if left < 0:
            raise Fault("the server sends more than it was asked for", most=0)
        yield data
    if left:
        raise Fault(f"the answer ends {left:,} bytes early")


def _check(file: RemoteFile, place: _Place, urls: _Urls, response: httpx2.Response, wanted: tuple[int, int]) -> None:
    """The answer is what was asked for, of the file that was listed."""
    status, headers = response.status_code, response.headers
    if status in RETRIED_STATUS:
        raise Fault(f"the server answers {status}", wait=wait_for(headers))
    if status == 416:
        raise Fault(f"the server has no such range: the file has not the {file.size:,} bytes that were listed", most=0)
    if 400 <= status < 500:  # a signed address that has expired, mostly: the hub is asked again, and says if it is not
        place.forget(urls.first)
        raise Fault(f"the server answers {status}", most=_REFUSALS)
    if status == 200 and wanted != (0, file.size):
        hint = "download the model (`hf download`) and convert the folder"
        raise Fault("the server sends the whole file instead of the range that was asked for", hint, most=0)
    if status not in {200, 206}:
        raise Fault(f"the server answers {status}", most=0)
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Fault("the server compresses what it sends", most=0)
    if status == 206:
        _check_range(headers.get("Content-Range", ""), wanted, file.size)
    _check_etag(file, place, urls, headers)


def _check_range(found: str, wanted: tuple[int, int], size: int) -> None:
    start, stop = wanted
    match = _CONTENT_RANGE.fullmatch(found.strip())
    if match is None or tuple(map(int, match.groups())) != (start, stop - 1, size):
        raise Fault(f"the server sends {show(found)!r}, not 'bytes {start}-{stop - 1}/{size}'", most=0)


def _check_etag(file: RemoteFile, place: _Place, urls: _Urls, headers: Mapping[str, str]) -> None:
    """Bytes of two versions never get into one tensor: the storage's own ETag must stay, the hub's must be the file's.

    Where the storage has another one, the hub is asked again (:func:`_locate`), and says whether the file changed.
    """
    own, at_hub = headers.get("ETag"), _origin(urls.last) == _origin(file.url)
    linked = headers.get("X-Linked-Etag") or (own if at_hub else None)
    changed = linked is not None and _plain_etag(linked) != file.etag
    if changed or (own is not None and not at_hub and not place.same(own)):
        place.forget(urls.first)
        raise Fault("the file on the server is another one now: its ETag changed", most=_REFUSALS)


def _place(file: RemoteFile) -> _Place:
    with _places_lock:
        return _places.setdefault(file, _Place())


def _locate(file: RemoteFile) -> str:
    from huggingface_hub import constants, get_hf_file_metadata

    try:
        TRAFFIC.requested()
        found = get_hf_file_metadata(
            file.url, timeout=constants.HF_HUB_ETAG_TIMEOUT, library_name="l4convert", endpoint=constants.ENDPOINT
        )
    except retried_errors() as error:
        raise Fault(reason(error)) from error
    except Exception as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in RETRIED_STATUS:
            raise Fault(f"the server answers {response.status_code}", wait=wait_for(response.headers)) from error
        raise explain(error, file.name) from error
    if found.etag != file.etag or found.size not in {None, file.size}:
        raise RemoteError(
            f"{file.name}: the file on the server is not the one that was listed", "run again; name the commit"
        )
    return _redirected(file, file.url, found.location)


def _redirected(file: RemoteFile, url: str, location: str) -> str:
    schemes = {urlsplit(file.url).scheme, "https"}
    try:
        target = urljoin(url, location)
        scheme, _, _ = _origin(target)
    except ValueError as error:
        raise Fault("the server points to an address that is none", most=0) from error
    if scheme not in schemes:
        raise Fault(f"the server points to an address that is not {' or '.join(sorted(schemes))}", most=0)
    return target


def _headers(file: RemoteFile, url: str) -> dict[str, str]:
    """The user's token goes to the hub alone."""
    from huggingface_hub.utils import build_hf_headers

    token = None if _origin(url) == _origin(file.url) else False
    headers: dict[str, str] = build_hf_headers(token=token, library_name="l4convert")
    return headers


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _plain_etag(etag: str | None) -> str | None:
    return None if etag is None else etag.removeprefix("W/").strip('"')
