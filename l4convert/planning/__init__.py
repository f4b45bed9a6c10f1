"""What a conversion will write and need, from configuration and file headers alone."""

from l4convert.planning.disk import DiskPlan
from l4convert.planning.estimate import TimePlan
from l4convert.planning.memory import MemoryPlan
from l4convert.planning.plan import ConversionPlan
from l4convert.planning.tensors import KINDS, TensorPlan

__all__ = ["KINDS", "ConversionPlan", "DiskPlan", "MemoryPlan", "TensorPlan", "TimePlan"]
