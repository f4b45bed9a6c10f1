"""A small builder of ONNX nodes: named by scope, constants shared, nothing else.

It collects nodes into a list, so the same code writes a graph, a function body or a branch of an ``If``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from l4convert.checkpoint.lazy import LazyTensor

INT64_MAX = np.iinfo(np.int64).max
# Key in ``ir.Value.meta`` of an initializer that stays in model.onnx however large it is.
INLINE = "l4convert.inline"


def initializer(name: str, tensor: LazyTensor) -> ir.Value:
    """A graph value that holds a tensor; the tensor takes its name."""
    tensor.name = name
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)


class Builder:
    """Appends nodes to :attr:`nodes` and names them ``scope/name``.

    Args:
        prefix: Put in front of every name; nodes of different builders in one graph need different prefixes.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._scopes = [prefix] if prefix else []
        self._counts: Counter[str] = Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    @property
    def prefix(self) -> str:
        """The scope that new names are in."""
        return "/".join(self._scopes)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names inside the ``with`` block get ``name/`` in front."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def _unique(self, name: str) -> str:
        full = "/".join([*self._scopes, name])
        self._counts[full] += 1
        return full if self._counts[full] == 1 else f"{full}_{self._counts[full] - 1}"

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        outputs: int = 1,
        name: str | None = None,
        domain: str = "",
        overload: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Append one node; attributes are plain Python values. Returns its outputs, named after the node."""
        unique = self._unique(name or op_type)
        values = [ir.Value(name=unique if outputs == 1 else f"{unique}:{i}") for i in range(outputs)]
        self.nodes.append(
            ir.Node(
                domain,
                op_type,
                inputs,
                attributes=ir.convenience.convert_attributes(attributes),
                overload=overload,
                outputs=values,
                name=unique,
            )
        )
        return tuple(values)

    def op(self, op_type: str, *inputs: ir.Value | None, name: str | None = None, **attributes: Any) -> ir.Value:
        """Append a standard ONNX node with one output and return that output."""
        return self.node(op_type, inputs, name=name, **attributes)[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A ``Constant`` node; equal constants of one builder are one node."""
        array = np.asarray(value, dtype=dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", name="constant", value=ir.tensor(array))
        return self._constants[key]

    # Idioms of two or more nodes that the definitions below use all over.

    def dim(self, value: ir.Value, axis: int) -> ir.Value:
        """The size of one axis, int64 of shape [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def slice(self, value: ir.Value, start: ir.Value, stop: ir.Value | None, axis: int) -> ir.Value:
        """``value[start:stop]`` along ``axis``; ``start`` and ``stop`` are int64 of shape [1], ``None``: to the end."""
        end = stop if stop is not None else self.constant([INT64_MAX])
        return self.op("Slice", value, start, end, self.constant([axis]))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape; 0 keeps an axis, -1 is inferred."""
        return self.op("Reshape", value, self.constant(list(shape)))
