"""Scales of quantized caches from the keys and values of a text: their maxima, and a sample to measure errors on.

The sample is at most ``SAMPLE_TOKENS`` tokens, evenly spread over the text, so memory does not grow with the text. A
scale maps the largest magnitude to the largest code (FP8: to half of it), or with INT4 a fraction of it where that
loses less on the sample: with few codes, clipping a rare maximum costs less than coarser steps for all that is not.

Keys of layers with rotary positions are stored rotated. A key that the text has at one place of a chunk may stand at
any other, where its channels share the length of a pair differently; so such keys are also looked at as they would be
at ``PLACES`` evenly spaced places. A text shorter than a chunk then still finds the range of slowly turning pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt

from l4convert.quantization.kv import KvDtype, KvScheme

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SAMPLE_TOKENS = 512
PLACES = 8

# Fractions of the maximum that are tried, and reach the largest code. Measured on tiny-scout (benchmarks/kv_cache.py):
# FP8 loses as much with twice the range, because its steps follow the size of a number, so other texts get that room;
# clipping gains INT8 nothing; INT4 gains, but below 0.7 errors of rare large keys cost more than their squares say.
_FRACTIONS: dict[KvDtype, tuple[float, ...]] = {
    "fp8": (2.0,),
    "int8": (1.0,),
    "int4": tuple(1 - step / 40 for step in range(13)),
}
_SMALLEST = float(np.finfo(np.float32).tiny)  # a subnormal scale may be flushed to 0, which cannot divide
_SCALE_BITS = 8


def sampled_tokens(tokens: int) -> npt.NDArray[np.int64]:
    """Which of so many tokens the sample has: sorted indices."""
    chosen: npt.NDArray[np.int64] = np.unique(np.linspace(0, tokens - 1, min(tokens, SAMPLE_TOKENS)).astype(np.int64))
    return chosen


@dataclass
class Spread:
    """What is known of one layer's keys or values.

    Attributes:
        maxima: max |x| of each channel, [Hk, D]; NaN or infinite where an element was.
        samples: [Hk, tokens, D] each.
    """

    maxima: Float32
    samples: list[Float32] = field(default_factory=list)

    @classmethod
    def empty(cls, heads: int, width: int) -> Spread:
        """Of no tokens yet."""
        return cls(np.zeros((heads, width), np.float32))

    def add(self, rows: Float32, chosen: npt.NDArray[np.int64]) -> None:
        """Count the tokens ``rows`` [Hk, n, D] in; the sample gets those with the indices ``chosen``."""
        self.maxima = np.maximum(self.maxima, np.abs(rows).max(axis=1, initial=0))  # NaN stays NaN
        if len(chosen):
            self.samples.append(rows[:, chosen].copy())

    def add_rotated(
        self, rows: Float32, chosen: npt.NDArray[np.int64], places: npt.NDArray[np.int64], rotation: Rotation
    ) -> None:
        """As :meth:`add`, for rotated keys at the ``places`` [n] of their chunks; see the module."""
        self.add(rows, chosen[:0])
        for turn in range(1, PLACES):
            moved = rotation.moved(rows, places, turn)
            self.maxima = np.maximum(self.maxima, np.abs(moved).max(axis=1, initial=0))
        for turn in range(PLACES):
            part = chosen[turn::PLACES]  # the sample sees each place once in a while, and stays as small
            if len(part):
                self.samples.append(rotation.moved(rows[:, part], places[part], turn))

    def scales(self, scheme: KvScheme) -> Float32:
        """The scheme's scales, float32 [1, Hk, 1, D] (granularity "head": equal along D)."""
        bound = _bounds(self.maxima, scheme) / np.float32(scheme.format.highest)
        candidates = np.stack([_usable(bound * fraction) for fraction in _FRACTIONS[scheme.dtype]])
        if len(candidates) == 1:
            return candidates[:, :, None]
        sample = np.concatenate(self.samples, axis=1)
        errors = np.stack([_error(sample, scale, scheme) for scale in candidates])
        best: Float32 = np.take_along_axis(candidates, errors.argmin(axis=0)[None], axis=0)
        return best[:, :, None]


@dataclass(frozen=True)
class Rotation:
    """Rotary positions of a chunked layer.

    Attributes:
        frequencies: Radians a token, of each pair of adjacent channels, [D/2].
        chunk: Places in a chunk.
    """

    frequencies: Float64
    chunk: int

    def moved(self, rows: Float32, places: npt.NDArray[np.int64], turn: int) -> Float32:
        """Rotated keys [Hk, n, D] as they would be ``turn / PLACES`` of a chunk further, where the chunk ends: again
        from its beginning."""
        if turn == 0:
            return rows.copy()
        ahead = (places + turn * self.chunk // PLACES) % self.chunk - places
        angles = ahead[:, None] * self.frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = rows[..., 0::2], rows[..., 1::2]
        result: Float32 = np.empty_like(rows)
        result[..., 0::2] = even * cos - odd * sin
        result[..., 1::2] = even * sin + odd * cos
        return result


def round_trip(x: Float32, scale: Float32, dtype: KvDtype) -> Float32:
    """What is read back of ``x`` from a cache with this scale."""
    form = KvScheme(dtype).format
    codes = np.clip(x / scale, np.float32(form.lowest), np.float32(form.highest))
    stored = codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) if dtype == "fp8" else np.rint(codes)
    result: Float32 = stored * scale
    return result


def _error(sample: Float32, scale: Float32, scheme: KvScheme) -> Float64:
    """Squared error of a sample [Hk, n, D] with the scales [Hk, D], of what shares a scale: [Hk, D]."""
    lost = round_trip(sample, scale[:, None], scheme.dtype) - sample
    of_channel: Float64 = (lost**2).sum(axis=1, dtype=np.float64)
    if scheme.granularity == "channel":
        return of_channel
    return np.broadcast_to(of_channel.sum(axis=1, keepdims=True), of_channel.shape)


def _bounds(maxima: Float32, scheme: KvScheme) -> Float32:
    """What each channel's scale has to reach, [Hk, D].

    A channel that was 0 all the time gives no scale; it takes its head's, and a head of zeros such that a scale is 1.
    """
    of_head = np.broadcast_to(maxima.max(axis=1, keepdims=True), maxima.shape)
    known = maxima if scheme.granularity == "channel" else of_head
    bounds: Float32 = np.where(known > 0, known, np.where(of_head > 0, of_head, np.float32(scheme.format.highest)))
    return bounds


def _usable(scale: Float32) -> Float32:
    """Scales rounded up to few bits, so that the last bits of sums, which differ between machines, hardly ever show."""
    mantissa, exponent = np.frexp(np.maximum(scale, _SMALLEST).astype(np.float64))
    rounded: Float32 = np.ldexp(np.ceil(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS).astype(np.float32)
    return rounded
