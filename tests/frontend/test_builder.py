from __future__ import annotations

import numpy as np

from l4convert.frontend.builder import Builder


def test_names_are_unique_and_scoped() -> None:
    b = Builder("top")
    with b.scope("layer"):
        first = b.op("Neg", b.constant([1]))
        second = b.op("Neg", first)
    assert (first.name, second.name) == ("top/layer/Neg", "top/layer/Neg_1")
    assert len({node.name for node in b.nodes}) == len(b.nodes)


def test_equal_constants_are_one_node_and_others_are_not() -> None:
    b = Builder()
    assert b.constant([1, 2]) is b.constant([1, 2])
    distinct = [b.constant([1, 2]), b.constant([[1, 2]]), b.constant([1, 2], np.int32), b.constant(1), b.constant([1])]
    assert len({id(value) for value in distinct}) == len(distinct)


def test_outputs_of_a_node_are_told_apart() -> None:
    b = Builder()
    gate, up = b.node("Split", [b.constant([1, 2])], outputs=2, num_outputs=2)
    assert gate.name != up.name
    assert gate.producer() is up.producer()
