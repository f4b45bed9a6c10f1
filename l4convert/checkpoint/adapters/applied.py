"""What is known of an adapter after it was merged, for reports and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4convert.checkpoint.text import known_name


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter that was merged into a checkpoint.

    Attributes:
        path: Its folder.
        files: adapter_config.json and the weights, for digests.
        base: The model it was trained on, as its config says.
        ranks, scales: How many updates have each.
        merged: Canonical names of the tensors with updates added.
        replaced: Those of tensors that were trained whole and only replaced.
        dequantized: Those of ``merged`` and ``replaced`` that the checkpoint stores quantized: their codes cannot be
            carried over.
        vision: Tensors of it that are about the vision part and were left out.
    """

    path: Path
    files: tuple[Path, ...]
    base: str | None
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    dequantized: tuple[str, ...]
    vision: int

    @property
    def words(self) -> str:
        """``merged into 96 tensors (rank 16, scale 2), 2 replaced; 12 of the vision part left out``."""
        parts = []
        if self.merged:
            parts.append(f"merged into {len(self.merged):,} tensors ({_range('rank', self.ranks)}, {self._scale})")
        if self.replaced:
            parts.append(f"{len(self.replaced):,} tensors replaced")
        if self.dequantized:
            parts.append(f"{len(self.dequantized):,} of them were stored quantized and are not any more")
        left_out = f"; {self.vision:,} of the vision part left out" if self.vision else ""
        return ", ".join(parts) + left_out

    @property
    def _scale(self) -> str:
        return _range("scale", self.scales)

    def to_dict(self) -> dict[str, Any]:
        """JSON fields, without the digests that a manifest adds."""
        return {
            "folder": known_name(self.path) or self.path.absolute().name,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "scales": {f"{scale:.9g}": count for scale, count in self.scales.items()},
            "merged": len(self.merged),
            "replaced": len(self.replaced),
            "dequantized": len(self.dequantized),
            "vision_left_out": self.vision,
        }


def _range(word: str, values: Mapping[int, int] | Mapping[float, int]) -> str:
    least, most = min(values), max(values)
    return f"{word} {least:g}" if least == most else f"{word}s {least:g} to {most:g}"
