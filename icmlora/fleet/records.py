"""The values that a `Fleet` returns from its store, for callers who do not import `registry`."""

from registry.names import LoadIn
from registry.records import (
    AdapterRecord,
    BaseModelRecord,
    Claim,
    CodeLimits,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    LabelRecord,
    Rung,
    TaskRecord,
    TaskSummary,
    VectorRecord,
    View,
)
from registry.tables.base_models import Joined, Separated

__all__ = [
    "AdapterRecord",
    "BaseModelRecord",
    "Claim",
    "CodeLimits",
    "CodeRecord",
    "EvaluationRecord",
    "GeneratorRecord",
    "Joined",
    "LabelRecord",
    "LoadIn",
    "Rung",
    "Separated",
    "TaskRecord",
    "TaskSummary",
    "VectorRecord",
    "View",
]
