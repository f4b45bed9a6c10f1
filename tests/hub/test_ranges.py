"""Reading ranges from a server that fails in every way it can: right bytes, or one clear line."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from l4convert.checkpoint.hub import faults
from l4convert.checkpoint.hub.address import Address
from l4convert.checkpoint.hub.listing import list_files
from l4convert.checkpoint.hub.ranges import read_range, receive
from l4convert.checkpoint.remote import RemoteFile
from l4convert.errors import RemoteError
from tests.checkpoint.refusals import assert_refused
from tests.hub.conftest import REPO, Serve
from tests.hub.server import Answer, Hub, Request, first, ranged, read_part, send_file, stall

NAME = "model.safetensors"
DATA = np.random.Generator(np.random.PCG64(0)).bytes(300_000)
START, STOP = 1_234, 250_000


@pytest.fixture
def hub(serve: Serve, tmp_path: Path) -> Hub:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(DATA)
    return serve(folder)


def remote(hub: Hub, **changes: object) -> RemoteFile:
    url = f"{hub.endpoint}/{REPO}/resolve/{hub.commit}/{NAME}"
    sha256 = hashlib.sha256(DATA).hexdigest()
    file = RemoteFile(Path("snapshot") / NAME, f"hf://{REPO}/{NAME}", url, len(DATA), sha256, sha256)
    return replace(file, **changes)  # type: ignore[arg-type]


def read(file: RemoteFile, start: int = START, stop: int = STOP) -> bytes:
    buffer = bytearray(stop - start)
    read_range(file, start, memoryview(buffer))
    return bytes(buffer)


def refused(file: RemoteFile, *mentions: str) -> None:
    error = assert_refused(lambda: read(file), [NAME, *mentions])
    assert isinstance(error, RemoteError)
    assert "signature" not in error.message


@pytest.mark.parametrize("redirect", [True, False])
@pytest.mark.parametrize("xet", [True, False])
def test_the_bytes_are_the_files(hub: Hub, redirect: bool, xet: bool) -> None:
    hub.redirect, hub.xet = redirect, xet
    assert read(remote(hub)) == DATA[START:STOP]
    assert read(remote(hub), 0, len(DATA)) == DATA
    # Xet or not, ranges come through the address that `resolve` gives, and it is asked for once.
    assert [request.server for request in hub.requests if ranged(request)] == ["storage" if redirect else "hub"] * 2
    assert len([request for request in hub.requests if request.method == "HEAD"]) == 1


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    refused(remote(hub), "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.requests.clear()
    assert read(remote(hub)) == DATA[START:STOP]
    assert {(r.server, r.headers.get("Authorization")) for r in hub.requests} == {
        ("hub", "Bearer hf_secret"),
        ("storage", None),
    }


def test_a_redirect_in_the_middle_takes_no_token_along(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect = False
    place = f"{hub.storage}/{NAME}?signature=secret"
    hub.faults.append(lambda r, a: r.server == "hub" and ranged(r) and a.send(307, {"Location": place}) is None)
    assert read(remote(hub)) == DATA[START:STOP]
    assert [r.headers.get("Authorization") for r in hub.requests if r.server == "storage"] == [None]


def reset(_: Request, answer: Answer) -> None:
    answer.reset()


def cut(request: Request, answer: Answer) -> None:
    """Half of the body, then the connection breaks."""
    assert request.range is not None
    start, stop = request.range
    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(DATA)}"}
    answer.send(206, headers, DATA[start : (start + stop) // 2], length=stop - start)
    answer.reset()


def status(code: int, headers: dict[str, str] | None = None) -> Callable[[Request, Answer], None]:
    return lambda _, answer: answer.send(code, headers)


@pytest.mark.parametrize(
    "how",
    [reset, cut, *(status(code) for code in (408, 425, 429, 500, 502, 503, 504)), status(403), status(404)],
    ids=["reset", "cut", "408", "425", "429", "500", "502", "503", "504", "403", "404"],
)
def test_what_can_pass_is_tried_again(hub: Hub, how: Callable[[Request, Answer], None]) -> None:
    hub.faults.append(first(2, ranged, how))
    assert read(remote(hub)) == DATA[START:STOP]


def test_what_came_before_a_break_is_not_asked_for_again(hub: Hub) -> None:
    def same_etag(request: Request, answer: Answer) -> None:
        assert request.range is not None
        start, stop = request.range
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(DATA)}"}
        answer.send(206, headers, DATA[start : (start + stop) // 2], length=stop - start)
        answer.handler.wfile.flush()
        time.sleep(0.05)  # so that the half arrives before the connection ends
        answer.handler.close_connection = True

    hub.faults.append(first(1, ranged, same_etag))
    assert read(remote(hub)) == DATA[START:STOP]
    assert hub.sent == STOP - START


@pytest.mark.parametrize("server", ["hub", "storage"])
def test_an_outage_that_does_not_pass_is_told(hub: Hub, server: str) -> None:
    hub.faults.append(lambda request, answer: request.server == server and answer.send(503) is None)
    refused(remote(hub), "503", f"bytes {START:,} to {STOP:,}")
    assert len([r for r in hub.requests if r.server == server]) == len(faults.WAITS) + 1


def test_a_server_that_wants_to_be_left_alone_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    hub.faults.append(first(1, ranged, status(429, {"Retry-After": "7"})))
    hub.faults.append(first(1, ranged, status(429, {"RateLimit": '"resolvers";r=0;t=55'})))
    hub.faults.append(first(1, ranged, status(429, {"Retry-After": "9" * 400})))
    assert read(remote(hub)) == DATA[START:STOP]
    assert waited == [7, 56, 0.01]


def test_a_server_that_says_nothing_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.faults.append(first(1, ranged, stall(0.4)))
    assert read(remote(hub)) == DATA[START:STOP]
    hub.faults.append(lambda request, answer: ranged(request) and stall(0.4)(request, answer) is None)
    refused(remote(hub), "stopped answering")


def test_a_server_without_ranges_is_refused(hub: Hub) -> None:
    path = hub.folder / NAME
    hub.faults.append(lambda r, a: ranged(r) and send_file(replace(r, headers={}), a, path, {}) is None)
    refused(remote(hub), "whole file", "hf download")


@pytest.mark.parametrize(
    "content_range",
    [
        f"bytes {START - 1}-{STOP - 2}/{len(DATA)}",
        f"bytes {START}-{STOP - 1}/{len(DATA) + 1}",
        f"bytes {START}-{STOP - 1}/*",
        f"bytes {START}-{'9' * 5000}/{len(DATA)}",
        "",
    ],
)
def test_another_range_than_asked_for_is_refused(hub: Hub, content_range: str) -> None:
    body = DATA[START:STOP]
    hub.faults.append(lambda r, a: ranged(r) and a.send(206, {"Content-Range": content_range}, body) is None)
    refused(remote(hub), "not 'bytes")


def test_too_long_a_body_is_refused(hub: Hub) -> None:
    headers = {"Content-Range": f"bytes {START}-{STOP - 1}/{len(DATA)}"}
    hub.faults.append(lambda r, a: ranged(r) and a.send(206, headers, DATA) is None)
    refused(remote(hub), "sends more")


def test_a_compressed_body_is_refused(hub: Hub) -> None:
    headers = {"Content-Range": f"bytes {START}-{STOP - 1}/{len(DATA)}", "Content-Encoding": "gzip"}
    hub.faults.append(lambda r, a: ranged(r) and a.send(206, headers, DATA[START:STOP]) is None)
    refused(remote(hub), "compresses")


@pytest.mark.parametrize("code", [416, 418, 204])
def test_odd_answers_are_refused(hub: Hub, code: int) -> None:
    hub.faults.append(lambda request, answer: ranged(request) and answer.send(code) is None)
    refused(remote(hub), "the server")


def test_a_file_that_changed_on_the_hub_is_refused(hub: Hub) -> None:
    file = remote(hub)
    assert read(file) == DATA[START:STOP]
    (hub.folder / NAME).write_bytes(bytes(len(DATA)))
    refused(file, "not the one that was listed")  # the storage's ETag changed, so the hub was asked again


def test_a_file_that_changed_without_a_storage_is_refused(hub: Hub) -> None:
    hub.redirect = False
    file = remote(hub)
    assert read(file) == DATA[START:STOP]
    (hub.folder / NAME).write_bytes(bytes(len(DATA)))
    refused(file, "not the one that was listed")


def test_an_etag_of_the_storage_that_changes_while_the_file_does_not_is_no_fault(hub: Hub) -> None:
    file = remote(hub)
    assert read(file) == DATA[START:STOP]
    headers = {"Content-Range": f"bytes {START}-{STOP - 1}/{len(DATA)}", "ETag": '"of another mirror"'}
    hub.faults.append(lambda r, a: ranged(r) and a.send(206, headers, DATA[START:STOP]) is None)
    assert read(file) == DATA[START:STOP]


@pytest.mark.parametrize("listed", [{"size": 300_001}, {"etag": "0" * 64}])
def test_a_listing_that_lied_is_refused(hub: Hub, listed: dict[str, object]) -> None:
    refused(remote(hub, **listed), "not the one that was listed")


@pytest.mark.parametrize("target", ["{storage}/loop", "{endpoint}/loop", "file:///etc/passwd", "gopher://x/", "//[bad"])
def test_redirects_that_lead_nowhere_are_refused(hub: Hub, target: str) -> None:
    place = target.format(storage=hub.storage, endpoint=hub.endpoint)
    hub.faults.append(lambda r, a: (ranged(r) or "loop" in r.path) and a.send(302, {"Location": place}) is None)
    refused(remote(hub))
    hub.faults[0] = lambda request, answer: answer.send(302, {"Location": place}) is None
    refused(remote(hub, name=f"again/{NAME}"))


def test_https_is_not_left(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from l4convert.checkpoint.hub import ranges

    file = remote(hub, url="https://127.0.0.1:1/x")
    found = type("Found", (), {"etag": file.etag, "size": None, "location": f"{hub.storage}/{NAME}"})
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: found)
    refused(file, "not https")
    assert ranges._redirected(file, file.url, "/there") == "https://127.0.0.1:1/there"


def test_a_machine_that_is_not_there_is_told(hub: Hub) -> None:
    hub.storage = "http://127.0.0.1:1"
    refused(remote(hub), "no connection")


def test_waiting_ends_when_the_run_does(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "WAITS", (60.0,))
    hub.faults.append(lambda request, answer: ranged(request) and answer.send(503) is None)
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    begin = time.monotonic()
    with pytest.raises(RemoteError):
        receive(remote(hub), 0, 10, lambda *_: None, stopped)
    assert time.monotonic() - begin < 10


def test_the_server_of_the_tests_is_one(hub: Hub) -> None:
    """What huggingface_hub makes of it is what it makes of the hub."""
    listing = list_files(Address(REPO, "main"))
    assert listing.source.commit == hub.commit
    assert [(file.name, file.nbytes, file.etag) for file in listing.files] == [
        (NAME, len(DATA), hashlib.sha256(DATA).hexdigest())
    ]
    assert read_part(hub.folder / NAME, 3, 9) == DATA[3:9]
