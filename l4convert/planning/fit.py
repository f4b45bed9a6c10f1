"""What fits on GPUs: the bytes that each of them holds, the largest context, and the GPUs that a context needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l4convert.checkpoint.config import DecoderConfig
from l4convert.frontend.compute import ComputeType
from l4convert.planning.caches import Caches
from l4convert.planning.figures import Figure
from l4convert.planning.shards import Weights
from l4convert.planning.speed import Layout
from l4convert.planning.working import (
    Call,
    element_bytes,
    host_figures,
    prefill_tokens,
    runtime_figure,
    working_figures,
)
from l4convert.progress import format_amount

# More groups of GPUs than this are no answer that anyone can use.
_MOST_GROUPS = 4096


@dataclass(frozen=True)
class Deployment:
    """A model on machines of one kind.

    Attributes:
        memory: Bytes of one GPU, or of the host.
        prefill_tokens: Most new tokens of a call.
        host: There is no second one.
        degrees: Degrees of tensor parallelism that may be chosen, ascending.
    """

    config: DecoderConfig
    target: str
    compute: ComputeType
    weights: Weights
    memory: int
    batch: int
    degrees: tuple[int, ...]
    prefill_tokens: int
    host: bool = False

    def budget(self, caches: Caches, context: int, layout: Layout) -> list[Figure]:
        """What each GPU holds while the last part of a prompt of this length is read."""
        own = caches.rank(layout.tensor)
        tokens = -(-context // layout.context)
        new = prefill_tokens(self.config, self.target, self.batch, tokens, self.prefill_tokens)
        width = element_bytes(self.compute)
        call = Call(self.config, self.batch, new, tokens, layout.tensor, width, own, self.weights.experts)
        return [
            self.weights.figure(layout.tensor),
            *own.figures(self.batch, context, layout.context),
            *host_figures(self.target, self.weights.half, own, self.batch, tokens),
            *working_figures(self.target, call),
            runtime_figure(self.target, self.config),
        ]

    def used(self, caches: Caches, context: int, layout: Layout) -> float:
        """Bytes on each GPU."""
        return sum(figure.value for figure in self.budget(caches, context, layout))

    def fits(self, caches: Caches, context: int, layout: Layout) -> bool:
        """Whether each GPU has the memory."""
        return self.used(caches, context, layout) <= self.memory

    def largest_context(self, caches: Caches, layout: Layout) -> int:
        """The longest context that fits, at most the model's positions; 0: not even one token does."""
        low, high = 0, self.config.max_position_embeddings
        if self.fits(caches, high, layout):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(caches, middle, layout) else (low, middle)
        return low

    def tensor_parallel(self, caches: Caches, context: int) -> Layout | None:
        """The fewest GPUs on which it fits, divided by heads alone."""
        layouts = (Layout(n) for n in self.degrees)
        return next((layout for layout in layouts if self.fits(caches, context, layout)), None)

    def split(self, caches: Caches, context: int, tensor: int) -> Layout | None:
        """The fewest groups of ``tensor`` GPUs that share the tokens of global layers; None: no number is enough."""
        low, high = 0, 1
        while not self.fits(caches, context, Layout(tensor, high)):
            low, high = high, 2 * high
            if high > _MOST_GROUPS:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(caches, context, Layout(tensor, middle)) else (middle, high)
        return Layout(tensor, high)

    def layout_for(self, caches: Caches, context: int) -> Layout | None:
        """Heads are divided first, as far as they can be; then the tokens of global layers."""
        layout = self.tensor_parallel(caches, context)
        return layout if layout or self.host else self.split(caches, context, self.degrees[-1])

    def fewest(self, caches: Caches, context: int) -> Layout | None:
        """The fewest GPUs if tokens may be split even where heads could be divided further."""
        found = (self.split(caches, context, n) for n in self.degrees)
        return min((layout for layout in found if layout), key=lambda layout: layout.gpus, default=None)

    def by_bytes(self, caches: Caches, context: int) -> Figure:
        """A lower bound: weights and caches over what one GPU has for them, as if both could be cut anywhere.

        0 where the runtime alone fills a GPU.
        """
        one = self.budget(caches, context, Layout(1))
        divisible = sum(figure.value for figure in one if figure.name.startswith(("weights", "caches", "scales")))
        fixed = runtime_figure(self.target, self.config).value
        room = self.memory - fixed
        number = math.ceil(divisible / room) if room > 0 else 0
        arithmetic = f"{divisible:,.0f} B of weights and caches / ({self.memory:,} - {fixed:,.0f} runtime)"
        return Figure("GPUs by bytes alone", number, "GPUs", arithmetic)

    def reason(self, caches: Caches, context: int, layout: Layout | None) -> str:
        """Why so many GPUs, in words."""
        if layout is None and self.host:
            return f"{_gb(self.used(caches, context, Layout(1)) - self.memory)} too much"
        if layout is None:
            least = self.used(caches, 0, Layout(self.degrees[-1]))
            return (
                f"{_gb(least)} are on each of {self.degrees[-1]} GPUs whatever the context; it has {_gb(self.memory)}"
                " (layers would have to be divided, too, which is not planned)"
            )
        if layout.gpus == 1:
            return f"one holds all of it, {_gb(self.memory - self.used(caches, context, layout))} are left"
        fewer = [n for n in self.degrees if n < layout.tensor]
        if layout.context > 1:
            over = self.used(caches, context, Layout(layout.tensor)) - self.memory
            return (
                f"each of {layout.tensor}, as far as the heads can be divided, would hold {_gb(over)} too much;"
                f" so {layout.context} groups share the tokens of global layers"
            )
        if not fewer:
            return "as asked for"
        over = self.used(caches, context, Layout(fewer[-1])) - self.memory
        heads = self.config.num_key_value_heads
        less = "one" if fewer[-1] == 1 else f"each of {fewer[-1]}"
        degrees = ", ".join(map(str, self.degrees))
        return f"{less} would hold {_gb(over)} too much, and {heads} key/value heads are divided evenly by {degrees}"


def _gb(nbytes: float) -> str:
    return format_amount(nbytes, "B")
