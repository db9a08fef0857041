"""The values that a `Fleet` returns from its store, for callers who do not import `registry`."""

from icmlora.fleet.bases.labels import Joined, Separated
from registry.manifests import (
    Adapter,
    BaseModel,
    Claim,
    Code,
    CodeLimits,
    Extra,
    File,
    Generator,
    Label,
    Measurement,
    Source,
    Task,
    Vector,
)
from registry.tables import TaskRow

__all__ = [
    "Adapter",
    "BaseModel",
    "Claim",
    "Code",
    "CodeLimits",
    "Extra",
    "File",
    "Generator",
    "Joined",
    "Label",
    "Measurement",
    "Separated",
    "Source",
    "Task",
    "TaskRow",
    "Vector",
]
