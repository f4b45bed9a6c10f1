"""Unification: a graph is itself, and is nothing that differs in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from l4convert.graph_passes.matching import Match, Mismatch, constant_of

UNARY, BINARY = ("Abs", "Neg", "Exp"), ("Add", "Sub", "Mul")
# One node: its operator and which values before it it takes (numbers count back from the newest).
Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(st.sampled_from(UNARY + BINARY), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=9
)


def build(description: Sequence[Step]) -> tuple[list[ir.Value], ir.Value, list[ir.Node]]:
    """Two inputs, then one node a step; the last one's output is the graph's."""
    inputs = [ir.Value(name="a"), ir.Value(name="b")]
    values, nodes = list(inputs), []
    for number, (op_type, *offsets) in enumerate(description):
        chosen = [values[-1 - offset % len(values)] for offset in offsets[: 1 if op_type in UNARY else 2]]
        attributes = ir.convenience.convert_attributes({"axis": number % 3}) if op_type == "Exp" else []
        nodes.append(ir.Node("", op_type, chosen, attributes, num_outputs=1, name=f"{op_type}_{number}"))
        nodes[-1].outputs[0].name = f"{op_type}_{number}"
        values.append(nodes[-1].outputs[0])
    return inputs, values[-1], nodes


def upstream(output: ir.Value) -> list[ir.Node]:
    """The nodes that the output depends on."""
    found: dict[ir.Node, None] = {}
    stack = [output]
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            stack += [value for value in node.inputs if value is not None]
    return list(found)


@given(steps)
def test_a_graph_is_itself(description):
    inputs, pattern, _ = build(description)
    graph_inputs, output, _ = build(description)
    match = Match(inputs)
    match.unify(pattern, output)
    assert match[pattern] is output
    reached = {value for node in upstream(pattern) for value in node.inputs}
    for mine, theirs in zip(inputs, graph_inputs, strict=True):
        if mine in reached:
            assert match[mine] is theirs


@given(steps, st.data())
def test_a_graph_with_another_operator_is_not(description, data):
    inputs, pattern, _ = build(description)
    _, output, _ = build(description)
    victim = data.draw(st.sampled_from(upstream(output)))
    victim.op_type = "Sqrt" if len(victim.inputs) == 1 else "Div"
    match = Match(inputs)
    with pytest.raises(Mismatch, match=f"{victim.op_type} {victim.name} stands where a "):
        match.unify(pattern, output)
    with pytest.raises(KeyError):
        match[pattern]  # nothing is bound


@given(steps, st.data())
def test_a_graph_with_another_attribute_is_not(description, data):
    description = [*description, ("Exp", 0, 0)]
    inputs, pattern, _ = build(description)
    _, output, _ = build(description)
    victim = data.draw(st.sampled_from([node for node in upstream(output) if node.op_type == "Exp"]))
    victim.attributes.add(ir.AttrInt64("axis", 7))
    with pytest.raises(Mismatch, match=f"Exp {victim.name} has other attributes"):
        Match(inputs).unify(pattern, output)


@given(steps, st.data())
def test_a_graph_with_another_connection_is_not(description, data):
    inputs, pattern, _ = build(description)
    _, output, _ = build(description)
    victim = data.draw(st.sampled_from(upstream(output)))
    index = data.draw(st.integers(0, len(victim.inputs) - 1))
    between = ir.Node("", "Identity", [victim.inputs[index]], num_outputs=1)
    between.outputs[0].name = "between"
    victim.replace_input_with(index, between.outputs[0])
    assume(between.inputs[0].producer() is not None)  # an input of the pattern stands for anything
    with pytest.raises(Mismatch, match="stands where"):
        Match(inputs).unify(pattern, output)


def _graph(op_type: str = "Add", domain: str = "") -> tuple[ir.Value, ir.Value, ir.Value]:
    a, b = ir.Value(name="a"), ir.Value(name="b")
    node = ir.Node(domain, op_type, [a, b], num_outputs=1)
    node.outputs[0].name = op_type
    return a, b, node.outputs[0]


def test_an_input_stands_for_one_value():
    a = ir.Value(name="a")
    twice = ir.Node("", "Add", [a, a], num_outputs=1).outputs[0]
    _, _, output = _graph()
    with pytest.raises(Mismatch, match=r"[ab] stands where [ab] should"):
        Match([a]).unify(twice, output)


def test_other_domains_are_other_operators():
    a, b, pattern = _graph()
    *_, output = _graph(domain="com.microsoft")
    with pytest.raises(Mismatch, match="Add Add stands where a Add should"):
        Match([a, b]).unify(pattern, output)


def test_a_weight_is_no_node():
    a, b, pattern = _graph()
    with pytest.raises(Mismatch, match="w is an input or a weight where a Add should be"):
        Match([a, b]).unify(pattern, ir.Value(name="w"))


def test_the_number_of_inputs_and_which_are_left_out_count():
    a, b = ir.Value(name="a"), ir.Value(name="b")

    def clip(*inputs: ir.Value | None) -> ir.Value:
        return ir.Node("", "Clip", inputs, num_outputs=1, name="clip").outputs[0]

    with pytest.raises(Mismatch, match="has 2 inputs, not 3"):
        Match([a, b]).unify(clip(a, None, b), clip(a, b))
    with pytest.raises(Mismatch, match="has other optional inputs"):
        Match([a, b]).unify(clip(a, None, b), clip(a, b, None))


def test_which_output_counts():
    a = ir.Value(name="a")
    pattern, graph = (ir.Node("", "Split", [a], num_outputs=2) for _ in range(2))
    with pytest.raises(Mismatch):
        Match([a]).unify(pattern.outputs[0], graph.outputs[1])


def _constant(array: np.ndarray) -> ir.Value:
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))], num_outputs=1).outputs[0]


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (np.float32(1.5), True),
        (np.float32(1.25), False),
        (np.float64(1.5), False),
        (np.array([1.5], np.float32), False),
    ],
)
def test_constants_are_compared_with_type_and_shape(value, same):
    pattern = _constant(np.array(1.5, np.float32))
    if same:
        Match([]).unify(pattern, _constant(np.asarray(value)))
    else:
        with pytest.raises(Mismatch, match="another value"):
            Match([]).unify(pattern, _constant(np.asarray(value)))


def test_an_output_beside_what_is_bound_is_found_downstream():
    def both() -> tuple[ir.Value, ir.Value, ir.Value]:
        a = ir.Value(name="a")
        ir.Node("", "Neg", [a], num_outputs=1)
        negated = ir.Node("", "Neg", [a], num_outputs=1).outputs[0]
        first = ir.Node("", "Exp", [a], num_outputs=1).outputs[0]
        second = ir.Node("", "Add", [negated, first], num_outputs=1).outputs[0]
        return a, first, second

    a, first, second = both()
    graph_a, graph_first, graph_second = both()
    match = Match([a])
    match.unify(first, graph_first)
    assert match.find(first) is graph_first
    # The node that joins the two branches has `first` as its second input, which is bound already.
    assert match.find(second) is graph_second
    assert match[a] is graph_a
    graph_second.producer().op_type = "Sub"
    other = Match([a])
    other.unify(first, graph_first)
    with pytest.raises(Mismatch, match="no Add that gives"):
        other.find(second)


def test_small_constants_are_read_wherever_they_are():
    assert constant_of(None) is None
    assert constant_of(_constant(np.array(3))) == 3
    stored = ir.Value(name="w", const_value=ir.tensor(np.array([4])))
    assert constant_of(stored) == 4
    *_, computed = _graph()
    assert constant_of(computed) is None
