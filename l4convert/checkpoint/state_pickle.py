"""Reading the pickle of a state dict without running it.

A pickle is a program for a stack machine. This reader knows the opcodes that Python's pickler writes for a dictionary
of tensors in protocol 2, which is what ``torch.save`` uses, and the names of :mod:`l4convert.checkpoint.state_names`.
A name never becomes the thing that it names, and a call only puts a description together. Whatever is not in the two
tables is refused, so nothing that a file says can import, call or set anything. Opcodes and operands: CPython's
``Lib/pickletools.py``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, NoReturn

from l4convert.checkpoint.state_names import NAMES, Name, Skipped, stored
from l4convert.checkpoint.text import quote, show
from l4convert.errors import InputError

MAX_BYTES = 64 << 20  # nearly all of it what Transformer Engine keeps beside the weights
MAX_STEPS = 200_000  # a tensor takes about 40
MAX_TEXT = 1024
_LONGEST_INTEGER = 8
HINT = "load it where you trust it, and save {name: tensor} with torch.save, or as safetensors"
_MARK = object()


def read_state(data: bytes, where: str) -> dict[str, Any]:
    """The entries of a pickled state dict.

    Args:
        data: The whole pickle.
        where: What messages call it.

    Returns:
        Key to :class:`~l4convert.checkpoint.state_names.PickledTensor`, or to anything else that the opcodes can make:
        ``Skipped``, None, a number, a text, a tuple, a dictionary, a ``Name`` or a ``PickledStorage``.

    Raises:
        InputError: It has an opcode or a name that no state dict needs, is broken, or is too large.
    """
    return _Machine(data, where).run()


class _Machine:
    """The stack machine; every step is one of :data:`_STEPS`."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data = data
        self._where = where
        self._at = 0  # of the opcode being done
        self._next = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def fail(self, problem: str) -> NoReturn:
        """Raise an InputError about the opcode that is being done."""
        key, depth, least = None, 0, len(self._stack)
        for item in self._stack:  # the outermost text is the key in the state dict, those above are within its value
            depth += item is _MARK
            if type(item) is str and depth <= least:
                key, least = item, depth
        after = "" if key is None else f", at or after '{show(key)}'"
        raise InputError(f"{self._where}: {problem} (pickle byte {self._at:,}{after})", HINT)

    def run(self) -> dict[str, Any]:
        if len(self._data) > MAX_BYTES:
            self.fail(f"a pickle of {len(self._data):,} bytes; no state dict needs more than {MAX_BYTES:,}")
        if self.take(2) != b"\x80\x02":
            self.fail("not a pickle of protocol 2, which torch.save writes")
        for done in count():
            self._at = self._next
            code = self.take(1)
            if code == b".":
                break
            if done == MAX_STEPS:
                self.fail(f"more than {MAX_STEPS:,} opcodes")
            step = _STEPS.get(code)
            if step is None:
                self.fail(f"opcode {_opcode(code)}, which no state dict needs")
            step(self)
        return self._result()

    def _result(self) -> dict[str, Any]:
        if self._next != len(self._data):
            self.fail(f"{len(self._data) - self._next:,} bytes after the pickle's end")
        if len(self._stack) != 1 or type(self._stack[0]) is not dict:
            self.fail("the pickle does not end with one dictionary")
        result: dict[str, Any] = self._stack[0]
        return result

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        if count > len(self._data) - self._next:
            self.fail("the pickle is cut off")
        self._next += count
        return self._data[self._next - count : self._next]

    def number(self, width: int) -> int:
        """An unsigned operand."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """A text operand that a line feed ends."""
        end = self._data.find(b"\n", self._next, self._next + MAX_TEXT)
        if end < 0:
            self.fail("a name that does not end")
        return self.take(end + 1 - self._next)[:-1].decode("utf-8", "backslashreplace")

    def text(self) -> str | Skipped:
        """A text operand with its length before it."""
        length = self.number(4)
        if length > MAX_TEXT:
            if length > len(self._data) - self._next:
                self.fail("the pickle is cut off")
            self._next += length
            return Skipped("text")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.fail("a text that is not UTF-8")

    def integer(self) -> int:
        """A signed operand with its width before it."""
        if (width := self.number(1)) > _LONGEST_INTEGER:
            self.fail(f"an integer of {width} bytes")
        return int.from_bytes(self.take(width), "little", signed=True)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self.fail("nothing is left on the pickle's stack")
        return self._stack.pop()

    def top(self) -> Any:
        self.push(value := self.pop())
        return value

    def tuple_of(self, count: int) -> None:
        """Replace the topmost values by a tuple of them."""
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def since_mark(self) -> list[Any]:
        """Take all values above the last mark, and it."""
        values = []
        while self._stack and self._stack[-1] is not _MARK:
            values.append(self._stack.pop())
        if not self._stack:
            self.fail("a mark is missing on the pickle's stack")
        self._stack.pop()
        return values[::-1]

    def remember(self, index: int) -> None:
        self._memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self._memo:
            self.fail(f"nothing was kept under number {index}")
        self.push(self._memo[index])

    def name(self) -> None:
        """``GLOBAL``: a name of the table."""
        text = f"{self.line()} {self.line()}"
        if text not in NAMES:
            self.fail(f"'{show(text.replace(' ', '.'))}' is named, which no state dict needs: it may be an attack")
        self.push(NAMES[text])

    def persistent(self) -> None:
        """``BINPERSID``: a storage."""
        self.push(stored(self.pop(), self.fail))

    def reduce(self) -> None:
        """``REDUCE``: a call."""
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or function.call is None or type(args) is not tuple:
            self.fail("a call of something that cannot be called")
        self.push(function.call(args, self.fail))

    def new(self) -> None:
        """``NEWOBJ``: an object without arguments."""
        args, kind = self.pop(), self.pop()
        if not isinstance(kind, Name) or kind.kind != "class" or args != ():
            self.fail("an object of something that is no class")
        self.push(Skipped(kind.text))

    def build(self) -> None:
        """``BUILD``: the state of a skipped object, or the versions of modules beside a state dict; neither is kept."""
        state, target = self.pop(), self.top()
        versions = type(target) is dict and type(state) is dict and state.keys() <= {"_metadata"}
        if not versions and target != Skipped("_io BytesIO"):
            self.fail("a state for something that has none")

    def set_items(self, pairs: list[Any]) -> None:
        """``SETITEM`` and ``SETITEMS``: entries of a dictionary."""
        target = self.top()
        if type(target) is not dict or len(pairs) % 2:
            self.fail("entries for something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                self.fail("a key that is not a text of usual length")
            if key in target:
                self.fail(f"key {quote(key)} occurs twice")
            target[key] = value


def _opcode(code: bytes) -> str:
    name = next((info.name for info in pickletools.opcodes if info.code.encode("latin1") == code), "unknown")
    return f"{name} (0x{code.hex()})"


_STEPS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"(": lambda m: m.push(_MARK),
    b")": lambda m: m.push(()),
    b"}": lambda m: m.push({}),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)),
    b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"\x8a": lambda m: m.push(m.integer()),
    b"X": lambda m: m.push(m.text()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"q": lambda m: m.remember(m.number(1)),
    b"r": lambda m: m.remember(m.number(4)),
    b"h": lambda m: m.recall(m.number(1)),
    b"j": lambda m: m.recall(m.number(4)),
    b"c": _Machine.name,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new,
    b"b": _Machine.build,
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.since_mark()),
}
"""Opcode to what it does; ``STOP`` ends the loop."""
