"""What can go wrong between this machine and the hub: what is tried again, and what a user is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from l4convert.checkpoint.text import show
from l4convert.errors import RemoteError

T = TypeVar("T")

# Seconds between one try and the next. A network that is gone for a minute must not end a conversion of an evening.
WAITS: tuple[float, ...] = (1, 2, 4, 8, 16, 30)
# The hub's rate limit has windows of five minutes.
_LONGEST_WAIT = 310
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
TOKEN_HINT = "log in with `hf auth login`, or set HF_TOKEN"  # noqa: S105 (no token)


class Fault(Exception):
    """One try to read a range failed.

    Args:
        message: Why.
        hint: What the user can do.
        wait: How many seconds the server wants to be left alone.
        most: How many more tries it is worth; 0: another one would end the same way.
    """

    def __init__(self, message: str, hint: str | None = None, *, wait: float = 0, most: int = len(WAITS)) -> None:
        super().__init__(message)
        self.hint = hint
        self.wait = wait
        self.most = most


def retried_errors() -> tuple[type[Exception], ...]:
    """Errors of the connection, after which the same request may succeed."""
    import httpx2

    return (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)


def wait_for(headers: Mapping[str, str]) -> float:
    """Seconds that a server wants to be left alone, from ``Retry-After`` or the hub's rate limit; else 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    after = headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return min(limit.reset_in_seconds + 1, _LONGEST_WAIT)
    return min(int(after), _LONGEST_WAIT) if after.isascii() and after.isdigit() and len(after) < 9 else 0


def ask_again(failures: int, wait: float, stopped: threading.Event | None) -> bool:
    """Wait, longer after every failure; whether another try is worth it.

    Args:
        failures: How many tries failed, one after the other.
        wait: Seconds to wait at least.
        stopped: Ends the waiting when it is set.
    """
    if failures > len(WAITS):
        return False
    seconds = max(wait, WAITS[failures - 1])
    if stopped is None:
        time.sleep(seconds)
        return True
    return not stopped.wait(seconds)


def trying(ask: Callable[[], T], what: str) -> T:
    """Ask the hub something small, again where it is overloaded or the connection breaks.

    Raises:
        RemoteError: It refuses, cannot be reached, or gives no answer that can be understood.
    """
    import httpx2

    failures = 0
    while True:
        wait = 0.0
        try:
            return ask()
        except httpx2.ConnectError as error:  # no network at all: told at once
            raise explain(error, what) from error
        except Exception as error:
            response = getattr(error, "response", None)
            if response is not None and response.status_code in RETRIED_STATUS:
                wait = wait_for(response.headers)
            elif not isinstance(error, retried_errors()):
                raise explain(error, what) from error
            failures += 1
            if not ask_again(failures, wait, None):
                raise explain(error, what) from error


def reason(error: Exception) -> str:
    """An error of the connection in a few words; without addresses, which may be signed."""
    import httpx2

    kinds: dict[type[Exception], str] = {
        httpx2.ConnectTimeout: "the server does not answer",
        httpx2.TimeoutException: "the server stopped answering",
        httpx2.ConnectError: f"no connection ({show(error)})",
        httpx2.RemoteProtocolError: f"the connection was broken off ({show(error)})",
        httpx2.NetworkError: f"the connection was broken off ({show(error)})",
        httpx2.UnsupportedProtocol: "the address is not one of http or https",
    }
    found = next((text for kind, text in kinds.items() if isinstance(error, kind)), None)
    return found or f"{type(error).__name__}: {show(error)}"


def explain(error: Exception, what: str) -> Exception:
    """An error of huggingface_hub as one line of ours.

    Args:
        error: What it raised.
        what: Names what was asked for.
    """
    from huggingface_hub import errors

    if isinstance(error, RemoteError | Fault):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RemoteError(f"{what}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it", "unset HF_HUB_OFFLINE")
    for kind, (meaning, hint) in _refusals().items():
        if isinstance(error, kind):
            return RemoteError(f"{what}: {meaning}", hint)
    message, advice = _describe(error)
    return RemoteError(f"{what}: {message}", advice)


def _describe(error: Exception) -> tuple[str, str | None]:
    """What happened, and a hint, where huggingface_hub has no word of its own for it."""
    import httpx2
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        said = f" ({show(error.server_message)})" if error.server_message else ""
        return f"the server answers {status}{said}", TOKEN_HINT if status in {401, 403} else None
    if isinstance(error, httpx2.HTTPError):
        return f"{show(constants.ENDPOINT)} cannot be reached: {reason(error)}", _NETWORK_HINT
    if isinstance(error, OSError) and error.errno:
        return f"{show(error.strerror)}" + (f": {show(error.filename)}" if error.filename else ""), None
    return f"not what a hub answers: {type(error).__name__}: {show(error)}", _NETWORK_HINT


_NETWORK_HINT = "check the network, proxies and HF_ENDPOINT"


def _refusals() -> dict[type[Exception], tuple[str, str]]:
    """Error -> what it means, and what to do; the more special one first."""
    from huggingface_hub import constants, errors

    return {
        errors.GatedRepoError: (
            "access is restricted to those who accepted the licence",
            f"accept it on the model's page at {constants.ENDPOINT}, then {TOKEN_HINT}",
        ),
        errors.RevisionNotFoundError: ("no such revision", "give a branch, a tag or a commit after the @"),
        errors.RemoteEntryNotFoundError: ("no such file", "look at the model's page for what it holds"),
        errors.RepositoryNotFoundError: ("no such model, or it is private", f"check the name, or {TOKEN_HINT}"),
        errors.DisabledRepoError: ("its owner has disabled access", "look at the model's page for the reason"),
    }
