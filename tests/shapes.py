"""Full-size models that have shapes but no content: reading a weight of one is an error."""

from __future__ import annotations

from l4convert.checkpoint.presets import BEHEMOTH, MAVERICK, SCOUT, planned_tensors

__all__ = ["BEHEMOTH", "MAVERICK", "SCOUT", "planned_tensors"]
