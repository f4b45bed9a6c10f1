"""How every refusal of an unusable checkpoint must look."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest

from l4convert.errors import InputError

SECONDS = 5.0


def assert_refused(action: Callable[[], object], mentions: Iterable[str]) -> InputError:
    """``action`` must soon raise an InputError of one short printable line that has all of ``mentions`` in it."""
    begin = time.monotonic()
    with pytest.raises(InputError) as caught:
        action()
    assert time.monotonic() - begin < SECONDS
    error = caught.value
    assert error.exit_code == 3
    assert error.message.isprintable(), error.message
    assert len(error.message) < 700
    assert error.hint is None or error.hint.isprintable()
    for mention in mentions:
        assert mention in f"{error.message} [{error.hint}]"
    return error
