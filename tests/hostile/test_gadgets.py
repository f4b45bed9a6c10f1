from __future__ import annotations

import sys

import pytest

from l4convert.checkpoint.state_pickle import read_state
from l4convert.errors import InputError
from tests.hostile.families.pickles import COMMAND, GADGETS
from tests.hostile.torch_files import NEWOBJ, POP, call, name, state, text, tuple_of


@pytest.mark.parametrize("form", ["called", "made anew"])
def test_every_gadget_is_refused_by_its_name(form: str) -> None:
    """Whatever it is called, and without importing it."""
    before = set(sys.modules)
    for dotted in GADGETS:
        module, _, attribute = dotted.rpartition(".")
        function = name(module, attribute)
        payload = call(function, text(COMMAND)) if form == "called" else function + tuple_of(text(COMMAND)) + NEWOBJ
        with pytest.raises(InputError) as caught:
            read_state(state({}, payload + POP), "data.pkl")
        assert dotted in caught.value.message
    assert set(sys.modules) == before


def test_there_are_many() -> None:
    assert len(set(GADGETS)) == len(GADGETS) > 150
