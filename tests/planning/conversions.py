"""Plans of models that are small in tensors and real in shapes."""

from __future__ import annotations

from l4convert.conversion import Conversion
from l4convert.emit.plan import WeightsPlan
from l4convert.options import PlanOptions
from l4convert.progress import NO_PROGRESS
from l4convert.quantization.recipe import Recipe

RECIPES = ("none", "int4", "fp8", "fp8-experts")
TARGETS = ("cpu", "portable")


def sample(recipe: str, target: str, preset: str = "maverick") -> tuple[WeightsPlan, Recipe]:
    """One layer of each kind, with random weights."""
    conversion = Conversion(PlanOptions(preset=preset, recipe=recipe, target=target), NO_PROGRESS)
    return conversion.sample(), conversion.recipe
